"Vectors of words: files of strangers, text of any shape, the command line."
import json, os, signal, threading, time
import forked, numpy as np, pytest
from hypothesis import given, settings, strategies as st
from slm.core import SLMError
from slm.model import vectors
from slm.model.vectors import WordVectors, open_vectors, train_vectors

DIGITS = str.maketrans('0123456789', 'abcdefghij')
FEW = WordVectors(['the', 'naïve', '東京', "o'clock"], np.random.default_rng(0).standard_normal((4, 5)).astype(np.float32))

@pytest.fixture(scope='module')
def files(tmp_path_factory):
    "A file of each format, and its bytes"
    d = tmp_path_factory.mktemp('vectors')
    for s in ('safetensors', 'txt', 'bin'): FEW.save(d/f'v.{s}')
    (d/'glove.txt').write_bytes(b''.join((d/'v.txt').read_bytes().splitlines(True)[1:]))
    return {p.name: p.read_bytes() for p in d.iterdir()}

@settings(max_examples=150)
@given(data=st.data())
def test_any_edit_of_a_file_is_one_line_or_vectors(files, data, tmp_path_factory):
    name = data.draw(st.sampled_from(sorted(files))); was = files[name]; at = data.draw(st.integers(0, len(was)))
    put,cut = data.draw(st.binary(max_size=12)),data.draw(st.integers(0, 12))
    new = data.draw(st.sampled_from([was[:at], was[at:], was[:at]+put+was[at+cut:]]))
    p = tmp_path_factory.mktemp('edit')/name; p.write_bytes(new)
    try: v = open_vectors(p)
    except SLMError as e: assert '\n' not in str(e) and name in str(e)
    else: assert np.isfinite(v.vectors).all() and len(v) == len(v.vectors) >= 1

@pytest.mark.parametrize('text', [b'', b'\n\n', b'5 3\n', b'1 0\na\n', b'word\n', b'-1 5\na 1 2 3 4 5\n', b'99999999999 99999999999\na 1\n',
                                  b'\x1f\x8b\x08junk'])
def test_what_is_no_file_of_vectors(text, tmp_path):
    p = tmp_path/('v.gz' if text[:1] == b'\x1f' else 'v.txt'); p.write_bytes(text)
    with pytest.raises(SLMError, match='v[.]'): open_vectors(p)

def test_of_a_word_that_stands_twice_the_first_counts(tmp_path):
    (tmp_path/'v.txt').write_text('a 1 0\nb 0 1\na 0 2\nc 1 1\n'); v = open_vectors(tmp_path/'v.txt')
    assert v.words == ['a', 'b', 'c'] and v['a'].tolist() == [1, 0] and v['c'].tolist() == [1, 1]

@pytest.mark.parametrize('words', ['5', 'null', '{"a": 1}', '[1]', '['*5000, '["a"]', '["a", "b", "c"]'])
def test_tensors_that_are_no_vectors(words, tmp_path):
    from safetensors.numpy import save_file
    save_file(dict(vectors=np.ones((2, 3), np.float32), words=np.frombuffer(words.encode(), np.uint8)), tmp_path/'v.safetensors')
    with pytest.raises(SLMError, match='holds no word vectors'): open_vectors(tmp_path/'v.safetensors')

def test_numbers_that_are_none_are_refused_in_every_format(tmp_path):
    odd = WordVectors(['a', 'b'], np.array([[1, np.nan], [1, 2]], np.float32))
    for s in ('safetensors', 'txt', 'bin'):
        odd.save(tmp_path/f'v.{s}')
        with pytest.raises(SLMError, match="of 'a' is not finite"): open_vectors(tmp_path/f'v.{s}')

def test_a_paragraph_of_thirty_thousand_words_is_not_cut():
    "What stands only at its end is learned too"
    rng = np.random.default_rng(0); ws = [f'w{i}' for i in rng.integers(0, 50, 30_000)]
    ws[20_000:] = [f'late{i}' for i in rng.integers(0, 50, 10_000)]
    v = train_vectors([ws], d=16, epochs=2, sample=0, threads=1); assert v.counts.sum() == 30_000
    assert min(np.abs(v.context[v.at[f'late{i}']]).max() for i in range(50)) > 1e-3

def test_text_is_read_anew_and_not_held():
    asked = []
    def text(): asked.append(1); return ([f'w{j%20}' for j in range(i, i+30)] for i in range(200))
    v = train_vectors(text, d=8, epochs=3, threads=1); assert len(asked) == 2 and len(v) == 20
    held = train_vectors(list(text()), d=8, epochs=3, threads=1); assert (held.vectors == v.vectors).all()

NAN = float('nan')
WRONG = [dict(kind='glove'), dict(min_count=10**6), *(dict(threads=n) for n in (-2, 10**6)), dict(seed=-1),
         *(dict(sample=x) for x in (-1, NAN)), *(dict(lr=x) for x in (0, -.1, NAN, 1e6)),
         *({k: n} for k in ('d', 'window', 'negative', 'epochs') for n in (0, -1, 10**12))]

@pytest.mark.parametrize('wrong', WRONG, ids=str)
def test_settings_that_cannot_be(wrong):
    with pytest.raises(SLMError): train_vectors([['a', 'b', 'c']*50]*20, **dict(threads=1) | wrong)

def test_a_thread_that_fails_is_not_passed_over(monkeypatch):
    monkeypatch.setitem(vectors._KERNELS, 'cbow', lambda *a: 1/0)
    with pytest.raises(ZeroDivisionError): train_vectors([['a', 'b', 'c']*50]*20, kind='cbow', threads=1)

def test_ctrl_c_leaves_nobody_at_work():
    text = [[f'w{j%500}' for j in range(1000)] for i in range(300)]; train_vectors(text[:20], d=8, threads=1, epochs=1)
    timer = threading.Timer(2, lambda: os.kill(os.getpid(), signal.SIGINT)); before = set(threading.enumerate())
    timer.start(); t0 = time.monotonic()
    with pytest.raises(KeyboardInterrupt): train_vectors(text, epochs=1000, threads=2)
    assert time.monotonic()-t0 < 30
    timer.join(); assert set(threading.enumerate()) <= before   # the timer itself may take longer to end than those at work

def test_the_command_line(tmp_path):
    rng = np.random.default_rng(0); out = tmp_path/'w.safetensors'; told = [f'w{i}'.translate(DIGITS) for i in range(80)]
    (tmp_path/'a.txt').write_text('\n\n'.join(' '.join([*rng.choice(told, 30), *['new', 'york'][:2*(i < 60)]]) for i in range(400)))
    spec = f'files:{tmp_path}/a.txt'; few = ('--epochs', 1, '--dim', 16, '--phrases', 1, '--threads', 1)
    r = forked.run('vectors', 'train', spec, *few, '--out', out, '--json'); assert r.returncode == 0, r.stderr
    res = json.loads(r.stdout); v = open_vectors(out)
    assert res['words'] == len(v) and 'new_york' in v and v.context is not None
    assert len(forked.run('vectors', 'similar', out, v.words[0], v.words[1], '-k', 3).stdout.splitlines()) == 2
    assert len(forked.run('vectors', 'analogy', out, *v.words[:3], '-k', 4).stdout.splitlines()) == 4
    too_rare = ('train', spec, '--min-count', 10**6, '--out', out)
    for args in (('similar', out, 'xyzzy'), ('similar', tmp_path/'none.bin', 'a'), too_rare):
        r = forked.run('vectors', *args); assert r.returncode == 2 and len(r.stderr.strip().splitlines()) == 1, r.stderr
    assert len(open_vectors(out)) == res['words']                               # a training that failed has not touched it
