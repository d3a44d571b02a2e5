"The loaders: every token once, nothing lost in a crash, every damage named."
import errno, json, os, signal, subprocess, sys, time
from types import SimpleNamespace
import numpy as np, pytest, torch
from hypothesis import HealthCheck, given, settings, strategies as st
from slm.core import SLMError
import slm.data.loaders as loaders
from slm.data.corpus import build_corpus
from slm.data.loaders import LMDataLoader, LMValidLoader, TokenData, TokenShards, doc_lens, epoch_plan, token_dls, tokenize, write_shard
from slm.data.tokenizer import char_tokenizer, train_bpe

quick = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
TOK = char_tokenizer(['abcdefgh \n'])

def fake_corpus(train, valid=('valid text',), name='fake', fingerprint='0123456789abcdef'):
    return SimpleNamespace(name=name, fingerprint=fingerprint, license='CC0', docs=lambda split: iter(train if split=='train' else valid))

def tape_of(docs): return [i for d in docs for i in (*TOK.encode(d), TOK.eot_id)]
def numbered(folder, n, parts=1, dtype='<u4'):
    "A tape whose token i is i, in several shards"
    arrs = [a.astype(dtype) for a in np.array_split(np.arange(n), parts) if len(a)]
    return TokenShards(folder, [write_shard(folder, k, [a], 0) for k,a in enumerate(arrs)], dtype)
def same(a, b): return all((s is None and t is None) or torch.equal(s, t) for s,t in zip(a, b, strict=True))

DOCS = [f'doc {i} '+'abc '*(i*7 % 13) for i in range(40)]
@pytest.fixture(scope='module')
def data(tmp_path_factory): return tokenize(fake_corpus(DOCS, DOCS[:9]), TOK, tmp_path_factory.mktemp('t')/'tokens', shard_tokens=150)

# ---- the tape

@quick
@given(docs=st.lists(st.text(alphabet='abcé🙂 \n', max_size=30), min_size=1, max_size=12), shard_tokens=st.integers(1, 60))
def test_the_tape_is_the_documents(docs, shard_tokens, tmp_path_factory):
    d = tokenize(fake_corpus(docs, docs[:2]), TOK, tmp_path_factory.mktemp('t')/'x', shard_tokens=shard_tokens); want = tape_of(docs)
    assert d.train.read(0, d.train.n_tokens).tolist() == want and d.train.n_bytes == sum(len(t.encode()) for t in docs)
    assert [d.train.doc(i).tolist() for i in range(len(docs))] == [tape_of([t]) for t in docs]
    assert d.train.doc_ends.tolist() == np.cumsum([len(tape_of([t])) for t in docs]).tolist()
    assert all(len(b) >= shard_tokens for b in d.train.bins[:-1])
    assert TOK.decode_bytes(d.valid.read(0, d.valid.n_tokens)) == ''.join(docs[:2]).encode()
    assert TOK.token_bytes()[want].sum() == d.train.n_bytes

@quick
@given(n=st.integers(1, 50), parts=st.integers(1, 7), start=st.integers(-120, 120), k=st.integers(0, 130))
def test_the_tape_is_a_circle(n, parts, start, k, tmp_path_factory):
    assert numbered(tmp_path_factory.mktemp('t'), n, parts).read(start, k).tolist() == [(start+i) % n for i in range(k)]

def test_wide_vocabulary_takes_four_bytes(tmp_path):
    wide = SimpleNamespace(vocab_size=70_000, fingerprint='f'*16, eot_id=0, pad_id=5, save=lambda p: None,
                           encode_batch=lambda ts: [[65_535, 69_999] for _ in ts])
    d = tokenize(fake_corpus(['x', 'y']), wide, tmp_path/'t')
    assert d.train.dtype == np.uint32 and d.train.read(0, 6).tolist() == [65_535, 69_999, 0]*2
    assert TokenData.open(tmp_path/'t').meta['dtype'] == '<u4'
def test_narrow_vocabulary_takes_two(data):
    assert data.train.dtype == np.uint16 and (data.path/'train'/'shard-00000.bin').stat().st_size == 2*len(data.train.bins[0])

def test_real_corpus(tmp_path):
    corpus = build_corpus('pydocs', max_bytes=300_000); tok = train_bpe(corpus.docs('train'), 700)
    d = tokenize(corpus, tok, tmp_path/'t')
    for split,ts in (('train', d.train), ('valid', d.valid)):
        assert (ts.n_docs, ts.n_bytes) == (corpus.n_docs[split], corpus.n_bytes[split])
        for i,text in enumerate(corpus.docs(split)): assert tok.decode(ts.doc(i), skip_special=False) == text+'<|endoftext|>'
    assert d.corpus == dict(name=corpus.name, fingerprint=corpus.fingerprint, license=corpus.license)
    assert d.tokenizer.fingerprint == tok.fingerprint

# ---- epochs

@quick
@given(n=st.integers(20, 400), t=st.integers(1, 20), bs=st.integers(1, 6), seed=st.integers(0, 9), parts=st.integers(1, 4))
def test_every_token_once_an_epoch(n, t, bs, seed, parts, tmp_path_factory):
    dl = LMDataLoader(numbered(tmp_path_factory.mktemp('t'), n, parts), bs, t, seed=seed, eot_id=n)
    for epoch in range(2):
        got = list(dl); assert len(got) == len(dl) == n//t//bs
        for x,y,m,lens in got: assert x.shape == y.shape == (bs, t) and m.all() and lens is None and torch.equal((x+1) % n, y)
        seen = [i for x,*_ in got for i in x.flatten().tolist()]
        assert len(seen) == len(set(seen)) and n-len(seen) == n-len(dl)*bs*t < t+bs*t
    assert (dl.epoch, dl.pos) == ((2, 0) if len(dl) else (dl.epoch, dl.pos))

def test_epochs_are_cut_and_ordered_anew():
    plans = [epoch_plan(10_000, 64, seed, epoch) for seed in (0, 1) for epoch in range(5)]
    assert len({p[0] % 64 for p in plans}) > 5 and len({tuple(p[1][:8]) for p in plans}) == 10
    for start,order in plans: assert sorted(order.tolist()) == list(range(156)) and 0 <= start < 10_000
    for a,b in zip(plans[0], epoch_plan(10_000, 64, 0, 0)): assert np.array_equal(a, b)

def test_block_borders_differ_between_epochs(tmp_path):
    dl = LMDataLoader(numbered(tmp_path, 640), 2, 64)
    firsts = [{x[r,0].item() % 64 for x,*_ in dl for r in range(2)} for _ in range(6)]
    assert all(len(f) == 1 for f in firsts) and len(set.union(*firsts)) > 3 # one stride an epoch, at another place each time

# ---- resuming

@pytest.mark.parametrize('stop', [0, 1, 5, 'end', 'end+3'])
def test_a_resumed_loader_deals_the_remaining_batches(data, stop):
    make = lambda: LMDataLoader(data.train, bs=2, seq_len=16, block_diagonal=True, seed=7)
    dl = make(); n = len(dl); stop = {'end': n, 'end+3': n+3}.get(stop, stop); assert n > 6
    def endless(dl):
        while True: yield from dl
    it = endless(dl)
    for _ in range(stop): next(it)
    state = json.loads(json.dumps(dl.state_dict())); rest = [next(it) for _ in range(2*n)]
    dl2 = make(); dl2.load_state_dict(state); it2 = endless(dl2)
    for b in rest: assert same(b, next(it2))
    assert dl2.state_dict() == dl.state_dict()

def test_the_position_names_the_first_batch_not_yet_trained_on(data):
    dl = LMDataLoader(data.train, 2, 16)
    for i,b in enumerate(dl):
        assert dl.pos == i+1
        if i == 2: break # as when training is interrupted inside a step
    assert same(next(iter(dl)), dl.at(0, 3)) # goes on, does not begin anew

def test_one_batch_does_not_move(data):
    dl = LMDataLoader(data.train, 2, 16); before = dl.state_dict()
    assert same(dl.one_batch(), dl.one_batch()) and dl.state_dict() == before and same(dl.one_batch(), next(iter(dl)))
    dl.pos = len(dl); assert same(dl.one_batch(), dl.at(1, 0)) and same(next(iter(dl)), dl.at(1, 0)) # a used-up epoch is left

def test_making_and_reading_loaders_leaves_the_generators_alone(data):
    import random, fastai.data.core
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    dls = token_dls(data, 2, 16); list(dls.train); list(dls.valid)
    assert torch.equal(before[0], torch.get_rng_state()) and before[1:] == (random.getstate(), np.random.get_state()[1].tolist())

@pytest.mark.parametrize('kw,what', [(dict(seed=1), 'seed 42, not 1'), (dict(bs=3), 'bs 2, not 3'), (dict(seq_len=8), 'seq_len 16, not 8')])
def test_a_position_of_another_loader_is_refused(data, kw, what):
    state = LMDataLoader(data.train, 2, 16).state_dict()
    with pytest.raises(SLMError, match=what): LMDataLoader(data.train, **{**dict(bs=2, seq_len=16), **kw}).load_state_dict(state)
def test_a_position_in_other_data_is_refused(data):
    with pytest.raises(SLMError, match='n_tokens'):
        LMDataLoader(data.valid, 2, 16).load_state_dict(LMDataLoader(data.train, 2, 16).state_dict())

# ---- documents in a row

def slow_lens(row, eot, pad_from=None):
    "The same, one token at a time"
    res = []
    for i,t in enumerate(row):
        new = i==0 or i==pad_from or (t==eot and (pad_from is None or i < pad_from))
        if new: res.append(0)
        res[-1] += 1
    return res

@settings(max_examples=300, deadline=None)
@given(b=st.integers(1, 5), t=st.integers(1, 12), seed=st.integers(0, 10**6), p=st.floats(0, 1), pad=st.integers(1, 12))
def test_doc_lens(b, t, seed, p, pad):
    rng = np.random.default_rng(seed); x = np.where(rng.random((b, t)) < p, 0, rng.integers(1, 9, (b, t)))
    for pad_from in (None, pad if pad < t else None):
        want = [slow_lens(r, 0, pad_from if k==b-1 else None) for k,r in enumerate(x.tolist())]; got = doc_lens(x, 0, pad_from)
        assert got.dtype == np.int64 and got.shape == (b, max(map(len, want))) and (got.sum(1) == t).all()
        assert [[n for n in r if n] for r in got.tolist()] == want and all(r == sorted(r, key=lambda n: n==0) for r in got.tolist())

def test_seqlens_cut_the_batches_at_the_documents(data):
    ends, n = set(data.train.doc_ends.tolist()), data.train.n_tokens
    dl = LMDataLoader(data.train, 3, 32, block_diagonal=True)
    start, order = dl._plan(0); k = 0
    for x,y,_,lens in dl:
        for row,ls in zip(x.tolist(), lens.tolist()):
            tape = start+int(order[k])*32; k += 1
            cuts = np.cumsum([l for l in ls if l])[:-1].tolist()
            # a cut stands before the end mark: the document ended on the tape one further
            assert {(tape+c+1) % n or n for c in cuts} == {(tape+i+1) % n or n for i in range(1, 32) if ((tape+i+1) % n or n) in ends}
            assert all(row[c] == TOK.eot_id for c in cuts)

# ---- validation

@quick
@given(docs=st.lists(st.text(alphabet='abc', max_size=25), min_size=1, max_size=6), t=st.integers(1, 12), bs=st.integers(1, 5),
       bd=st.booleans())
def test_validation_asks_for_every_token_once(docs, t, bs, bd, tmp_path_factory):
    d = tokenize(fake_corpus(['abc'*30], docs), TOK, tmp_path_factory.mktemp('t')/'x')
    vl = token_dls(d, 1, t, block_diagonal=bd).valid; vl.bs = bs; got = list(vl); want = tape_of(docs)
    assert len(got) == len(vl) and [i for _,y,m,_ in got for i in y[m].tolist()] == want
    assert [i for x,_,m,_ in got for i in x[m].tolist()] == [TOK.eot_id]+want[:-1]
    for k,(x,y,m,lens) in enumerate(got):
        assert x.shape == y.shape == m.shape and x.shape[1] == t and (k == len(got)-1 or m.all()) and m.any(1).all()
        assert (y[~m] == TOK.pad_id).all() and (x[~m] == TOK.pad_id).all() and (lens is None) == (not bd)
        if bd: assert (lens.sum(1) == t).all()
    assert all(same(a, b) for a,b in zip(got, vl))

def test_padding_that_is_the_end_mark_makes_no_documents(data):
    vl = LMValidLoader(data.valid, bs=2, seq_len=50, block_diagonal=True, eot_id=0, pad_id=0); *_,(x,y,m,lens) = vl
    assert not m[-1].all() and lens[-1][lens[-1] > 0][-1] == (~m[-1]).sum()

# ---- fastai

def test_learner(data):
    from fastai.learner import Learner
    from fastai.callback.progress import ProgressCallback
    dls = token_dls(data, 4, 16, block_diagonal=True); torch.manual_seed(0); seen = []
    class Net(torch.nn.Module):
        def __init__(self): super().__init__(); self.e = torch.nn.Embedding(TOK.vocab_size, TOK.vocab_size)
        def forward(self, x): seen.append(x.clone()); return self.e(x)
    def loss(logits, y, mask, seqlens):
        assert (seqlens.sum(1) == 16).all(); return torch.nn.functional.cross_entropy(logits[mask], y[mask])
    learn = Learner(dls, Net(), loss_func=loss, lr=.1, path=data.path)
    with learn.no_bar(), learn.no_logging(): learn.fit(3)
    first, last = learn.recorder.values[0], learn.recorder.values[-1]
    assert last[1] < first[1]-.3 and len(seen) == 3*(len(dls.train)+len(dls.valid)) and dls.train.epoch == 3 and dls.train.pos == 0
    again = LMDataLoader(data.train, 4, 16); assert torch.equal(seen[0], again.at(0, 0)[0])
    assert torch.equal(seen[len(dls.train)+len(dls.valid)], again.at(1, 0)[0])
    assert dls.n_inp == 1 and dls.device == torch.device('cpu') and len(dls.one_batch()) == 4

def test_devices(data):
    dls = token_dls(data, 2, 16, device='meta', block_diagonal=True)
    assert all(t.device.type == 'meta' for dl in (dls.train, dls.valid) for t in dl.one_batch())
    dls.to('cpu'); assert dls.train.one_batch()[0].device.type == dls.valid.one_batch()[3].device.type == 'cpu'

@pytest.mark.parametrize('bs,t,what', [(1, 10**6, 'longer than corpus .fake.'), (1000, 16, 'make the batch smaller'), (0, 16, 'at least 1'),
                                       (2, 0, 'at least 1')])
def test_sizes_that_do_not_fit(data, bs, t, what):
    with pytest.raises(SLMError, match=what): token_dls(data, bs, t)
def test_no_validation_text(tmp_path):
    d = tokenize(fake_corpus(DOCS, ()), TOK, tmp_path/'t'); assert d.valid.n_tokens == 0
    with pytest.raises(SLMError, match='no validation text'): token_dls(d, 1, 16)
def test_no_text(tmp_path):
    with pytest.raises(SLMError, match='is empty'): tokenize(fake_corpus([], []), TOK, tmp_path/'t')
    assert not (tmp_path/'t'/'meta.json').exists()
def test_a_tokenizer_without_end_mark(tmp_path):
    with pytest.raises(SLMError, match='no end-of-text'): tokenize(fake_corpus(DOCS), SimpleNamespace(eot_id=None), tmp_path/'t')

# ---- interrupted and damaged

def files(p): return {str(f.relative_to(p)): f.read_bytes() for f in sorted(p.rglob('*')) if f.is_file()}

@pytest.mark.parametrize('stop', [('train', 0), ('train', 1), ('train', 17), ('train', 39), ('valid', 0), ('valid', 8)])
def test_interrupted_tokenizing_goes_on(data, stop, tmp_path):
    def docs(split):
        for i,t in enumerate(DOCS if split=='train' else DOCS[:9]):
            if (split, i) == stop: raise KeyboardInterrupt
            yield t
    broken = SimpleNamespace(**{**vars(fake_corpus([])), 'docs': docs})
    with pytest.raises(KeyboardInterrupt): tokenize(broken, TOK, tmp_path/'t', shard_tokens=150)
    with pytest.raises(SLMError): TokenData.open(tmp_path/'t')
    tokenize(fake_corpus(DOCS, DOCS[:9]), TOK, tmp_path/'t', shard_tokens=150)
    assert files(tmp_path/'t') == files(data.path)

def test_finished_shards_are_not_made_again(data, tmp_path, monkeypatch):
    real, n = loaders.write_shard, []
    def dies(*a):
        if len(n) == 2: raise KeyboardInterrupt
        n.append(a[1]); return real(*a)
    monkeypatch.setattr(loaders, 'write_shard', dies)
    with pytest.raises(KeyboardInterrupt): tokenize(fake_corpus(DOCS, DOCS[:9]), TOK, tmp_path/'t', shard_tokens=150)
    monkeypatch.setattr(loaders, 'write_shard', lambda *a: (n.append(a[1]), real(*a))[1])
    tokenize(fake_corpus(DOCS, DOCS[:9]), TOK, tmp_path/'t', shard_tokens=150)
    assert n[:3] == [0, 1, 2] and files(tmp_path/'t') == files(data.path)

KILLED = """
import sys, time
from types import SimpleNamespace
from slm.data.loaders import tokenize
from slm.data.tokenizer import char_tokenizer
def docs(split):
    for i in range(40):
        if i == 25: print('half', flush=True); time.sleep(60)
        yield f'doc {i} '+'abc '*(i*7 % 13)
tokenize(SimpleNamespace(name='fake', fingerprint='0123456789abcdef', license='CC0', docs=docs), char_tokenizer(['abcdefgh \\n']),
         sys.argv[1], shard_tokens=150)
"""
def test_killed_tokenizing_goes_on(data, tmp_path):
    p = subprocess.Popen([sys.executable, '-c', KILLED, str(tmp_path/'t')], stdout=subprocess.PIPE, text=True)
    assert p.stdout.readline() == 'half\n'; p.send_signal(signal.SIGKILL); p.wait()
    assert (tmp_path/'t'/'building.json').exists() and not (tmp_path/'t'/'meta.json').exists()
    tokenize(fake_corpus(DOCS, DOCS[:9]), TOK, tmp_path/'t', shard_tokens=150); assert files(tmp_path/'t') == files(data.path)

def test_a_full_disk_is_one_line_and_can_be_gone_on_from(data, tmp_path, monkeypatch):
    real, n = loaders.atomic_file, []
    def full(path, mode='w'):
        n.append(path)
        if len(n) > 3: raise OSError(errno.ENOSPC, 'No space left on device')
        return real(path, mode)
    monkeypatch.setattr(loaders, 'atomic_file', full)
    with pytest.raises(SLMError, match='No space left.*make room'):
        tokenize(fake_corpus(DOCS, DOCS[:9]), TOK, tmp_path/'t', shard_tokens=150)
    monkeypatch.setattr(loaders, 'atomic_file', real)
    tokenize(fake_corpus(DOCS, DOCS[:9]), TOK, tmp_path/'t', shard_tokens=150); assert files(tmp_path/'t') == files(data.path)

@pytest.fixture
def copy(data, tmp_path): import shutil; shutil.copytree(data.path, tmp_path/'c'); return tmp_path/'c'

@pytest.mark.parametrize('file', ['train/shard-00001.bin', 'train/shard-00000.idx', 'valid/shard-00000.bin', 'valid/shard-00000.idx'])
@pytest.mark.parametrize('how,what',
                         [('missing', 'is missing'), ('truncated', 'is truncated'), ('longer', 'is too long'), ('corrupt', 'is corrupt')])
def test_damaged_shards_are_named(copy, file, how, what):
    f = copy/file; b = f.read_bytes()
    if how == 'missing': f.unlink()
    else: f.write_bytes(dict(truncated=b[:-1], longer=b+b'\0', corrupt=b[:4]+bytes([b[4]^1])+b[5:])[how])
    with pytest.raises(SLMError, match=f'{f.name}.*({what})') as e: TokenData.open(copy)
    assert file in str(e.value) and '\n' not in str(e.value)
    with pytest.raises(SLMError, match=f.name): tokenize(fake_corpus(DOCS, DOCS[:9]), TOK, copy) # neither used nor replaced in silence
    if how == 'corrupt': TokenData.open(copy, verify=False) # asked not to look

def test_a_damaged_finished_shard_is_named_when_going_on(copy):
    meta = json.loads((copy/'meta.json').read_text()); (copy/'meta.json').unlink(); (copy/'building.json').write_text(json.dumps(meta))
    f = copy/'train'/'shard-00000.bin'; b = f.read_bytes(); f.write_bytes(b[:-2])
    with pytest.raises(SLMError, match='shard-00000.bin.*truncated'): tokenize(fake_corpus(DOCS, DOCS[:9]), TOK, copy, shard_tokens=150)
    f.write_bytes(b); assert tokenize(fake_corpus(DOCS, DOCS[:9]), TOK, copy, shard_tokens=150).train.n_docs == 40

def test_damaged_meta(copy):
    good = json.loads((copy/'meta.json').read_text())
    less = {k:v for k,v in good.items() if k!='dtype'}
    for content,what in (('{', 'not valid JSON'), (json.dumps(less), 'lacks dtype'), (json.dumps({**good, 'schema': 99}), 'newer version')):
        (copy/'meta.json').write_text(content)
        with pytest.raises(SLMError, match=what): TokenData.open(copy)

def test_what_belongs_to_something_else(data, copy, tmp_path):
    other = char_tokenizer(['other'])
    with pytest.raises(SLMError, match=f'another tokenizer .*{other.fingerprint}'): TokenData.open(data.path, other)
    with pytest.raises(SLMError, match='another tokenizer'): tokenize(fake_corpus(DOCS, DOCS[:9]), other, copy)
    with pytest.raises(SLMError, match='another corpus'): tokenize(fake_corpus(DOCS, DOCS[:9], fingerprint='f'*16), TOK, copy)
    (tmp_path/'mine').mkdir(); (tmp_path/'mine'/'letter.txt').write_text('dear')
    with pytest.raises(SLMError, match='not empty'): tokenize(fake_corpus(DOCS), TOK, tmp_path/'mine')
    (copy/'building.json').write_text((copy/'meta.json').read_text()); (copy/'meta.json').unlink()
    with pytest.raises(SLMError, match='begun with another'): tokenize(fake_corpus(DOCS, fingerprint='f'*16), TOK, copy)
    with pytest.raises(SLMError, match='no tokens in'): TokenData.open(tmp_path/'nowhere')

def test_finished_tokens_are_just_opened(data):
    before = {k: f.stat().st_mtime_ns for k in files(data.path) if (f := data.path/k)}
    assert tokenize(fake_corpus(None), TOK, data.path).train.n_docs == 40 # the documents are not even looked at
    assert before == {k: (data.path/k).stat().st_mtime_ns for k in before}

def test_default_place(tmp_path, monkeypatch):
    monkeypatch.setenv('SLM_HOME', str(tmp_path)); d = tokenize(fake_corpus(DOCS, name='hf:a/b c'), TOK)
    assert d.path.parent == tmp_path/'tokens' and d.path.name == f'hf-a-b-c-01234567-{TOK.fingerprint[:8]}'
