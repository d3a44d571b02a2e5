"slm.data.corpus: faults, hub streaming against a stand-in for the hub, properties of normalisation, cutting and hashing, peak memory."
import errno, gzip, json, os, re, shutil, subprocess, sys, types, unicodedata
from pathlib import Path
import numpy as np, pyarrow as pa, pyarrow.parquet as pq, pytest
from hypothesis import given, settings, strategies as st
from slm.core import SLMError, slm_home
import slm.data.corpus as C
from slm.data.corpus import *
from hub import SHA, Hub

ROOT = Path(__file__).parent.parent
WORDS = 'the a of river stone lamp winter garden reads slowly under every bright old'.split()

def prose(n, seed=0, least=30, most=120):
    "n paragraphs of random words, no two alike"
    rng = np.random.default_rng(seed)
    return [' '.join(WORDS[i] for i in rng.integers(0, len(WORDS), rng.integers(least, most))) + f' {seed}-{k}.' for k in range(n)]

@pytest.fixture
def here(tmp_path, monkeypatch):
    "An empty working folder, and a home for corpora of its own"
    monkeypatch.chdir(tmp_path); monkeypatch.setenv('SLM_HOME', str(tmp_path/'home')); return tmp_path

def fails(spec, *parts, **kw):
    "Building `spec` is one line that holds all `parts`, and leaves nothing behind"
    before = {p for p in Path('.').rglob('*') if 'home' not in p.parts}
    with pytest.raises(SLMError) as e: build_corpus(spec, out='out', **kw)
    msg = str(e.value)
    assert '\n' not in msg
    for p in parts: assert p in msg, msg
    assert {p for p in Path('.').rglob('*') if 'home' not in p.parts} == before
    return msg

def texts(c): return [*c.docs('train'), *c.docs('valid')]

# ---------------------------------------------------------------- properties

any_text = st.text(st.characters(codec=None, exclude_categories=()), max_size=80)

@given(any_text)
@settings(max_examples=400, deadline=None)
def test_normalise_is_idempotent_and_clean(s):
    t = normalise(s)
    assert normalise(t) == t and unicodedata.is_normalized('NFC', t)
    assert not any((unicodedata.category(c) in ('Cc', 'Cs') and c not in '\t\n') or c in '\ufeff\u2028\u2029' for c in t)
    t.encode()

@given(any_text)
@settings(max_examples=200, deadline=None)
def test_normalise_ignores_the_way_of_writing(s):
    assert normalise(unicodedata.normalize('NFD', s)) == normalise(unicodedata.normalize('NFC', s))
    plain = s.replace('\r', '').replace('\n', ' \n')
    assert normalise(plain.replace('\n', '\r\n')) == normalise(plain.replace('\n', '\r')) == normalise(plain)

@given(st.lists(st.sampled_from(['word ', 'a', '\n', '\n\n', '. ', 'x'*9, 'é猫🙂 ']), max_size=200), st.integers(1, 30), st.integers(1, 50))
@settings(max_examples=300, deadline=None)
def test_cut_loses_nothing_and_is_blind_to_blocks(parts, size, block):
    text = ''.join(parts); docs, rest = cut(text, size)
    assert rest == '' and all(d and d == d.strip('\n') and len(d) <= 8*size for d in docs)
    assert re.sub(r'\n+', '', ''.join(docs)) == re.sub(r'\n+', '', text)
    again, rest = [], ''
    for i in range(0, max(len(text), 1), block):
        done, rest = cut(rest + text[i:i+block], size, final=i+block >= len(text)); again += done
    assert again == docs

@given(st.lists(st.integers(0, 9), max_size=60))
def test_first_of(ks): assert first_of(np.array(ks, np.uint64)).tolist() == [ks.index(k) for k in ks]

@given(st.lists(st.lists(st.sampled_from(['One', 'two', 'THREE', 'vier', 'fünf', '6']), max_size=12), min_size=1, max_size=6),
       st.sampled_from([' ', ', ', '\n', ' -- ', '.']))
@settings(max_examples=200, deadline=None)
def test_shingles_are_those_of_python_sets(docs, sep):
    hashes, at = shingles([sep.join(d).encode() for d in docs])
    assert len(at) == len(docs)+1 and at[-1] == len(hashes)
    seen = {}
    for d,i,j in zip(docs, at, at[1:]):
        low = [w.lower() for w in d]; want = [tuple(low[k:k+5]) for k in range(len(low)-4)]
        assert len(want) == j-i
        for w,h in zip(want, hashes[i:j].tolist()): assert seen.setdefault(w, h) == h
    assert len(set(seen.values())) == len(seen)

def test_minhash_agrees_with_datasketch_on_similarity():
    datasketch = pytest.importorskip('datasketch')
    rng = np.random.default_rng(0); base = rng.integers(0, 2**63, 400).tolist()
    for keep in (100, 250, 350):
        a, b = base, base[:keep] + rng.integers(0, 2**63, 400-keep).tolist()
        sig = signatures(np.array(a+b, np.uint64), np.array([0, 400, 800]))
        theirs = [datasketch.MinHash(512, hashfunc=lambda x: x & 0xffffffff) for _ in 'ab']
        for m,x in zip(theirs, (a, b)): m.update_batch(x)
        assert abs((sig[0] == sig[1]).mean() - theirs[0].jaccard(theirs[1])) < .15 # 3 standard deviations of 112 against 512 hashes
        assert abs((sig[0] == sig[1]).mean() - keep/(800-keep)) < .14

# ---------------------------------------------------------------- files of every kind

def test_every_kind_of_file_gives_the_same_documents(here):
    ps = prose(400); blank = '\n\n'.join(ps)
    Path('a.jsonl').write_text(''.join(json.dumps(dict(id=i, text=p))+'\n' for i,p in enumerate(ps)))
    with gzip.open('b.jsonl.gz', 'wt') as f: f.write(Path('a.jsonl').read_text())
    pq.write_table(pa.table(dict(text=ps, n=range(400))), 'c.parquet', row_group_size=50)
    corpora = [build_corpus(f'files:{f}', out=f'out-{f}') for f in ('a.jsonl', 'b.jsonl.gz', 'c.parquet')]
    assert len({c.fingerprint for c in corpora}) == 1 and sorted(texts(corpora[0])) == sorted(ps)
    for f in ('d.txt', 'e.md', 'f.rst'): Path(f).write_text(blank)
    with gzip.open('g.txt.gz', 'wt') as f: f.write(blank)
    cs = [build_corpus(f'files:{f}', out=f'out-{f}') for f in ('d.txt', 'e.md', 'f.rst', 'g.txt.gz')]
    assert len({c.fingerprint for c in cs[:3]}) == 1
    for c in cs: assert sorted('\n\n'.join(texts(c)).split('\n\n')) == sorted(ps)

def test_glob_is_recursive_sorted_and_names_no_absolute_path(here):
    for n in ('b/x.txt', 'a/y.txt', 'a/deep/z.txt'):
        Path('t', n).parent.mkdir(parents=True, exist_ok=True); Path('t', n).write_text('\n\n'.join(prose(30, seed=len(n))))
    c = build_corpus(f"files:{here}/t/**/*.txt", out='out')
    assert [i['name'] for i in c.info['inputs']] == ['a/deep/z.txt', 'a/y.txt', 'b/x.txt']
    assert str(here) not in Path('out/corpus.json').read_text() and c.info['spec'] == 'files:*.txt'

def test_duplicates_go_whether_exact_or_near(here):
    ps = prose(300, least=80); near = [p.replace('river', 'brook', 1) for p in ps[:40] if 'river' in p]
    Path('a.jsonl').write_text('\n'.join(json.dumps(dict(text=t)) for t in ps + ps[:25] + near))
    c = build_corpus('files:a.jsonl', out='near'); d = c.stats['dropped']
    assert d['exact duplicate']['documents'] == 25 and d['near duplicate']['documents'] >= .95*len(near)
    assert set(texts(c)) <= set(ps + near) and set(ps) - set(texts(c)) == set() # the first of each group stays
    exact = build_corpus('files:a.jsonl', out='exact', near_dedup=False)
    assert sum(exact.n_docs.values()) == len(ps) + len(near)
    everything = build_corpus('files:a.jsonl', out='all', dedup=False)
    assert sum(everything.n_docs.values()) == len(ps) + len(near) + 25
    assert not set(everything.docs('train')) & set(everything.docs('valid')) # copies share a side

def test_short_documents_are_not_near_duplicates(here):
    Path('a.jsonl').write_text('\n'.join(json.dumps(dict(text=f'{w} {v}')) for w in WORDS for v in WORDS))
    assert sum(build_corpus('files:a.jsonl', out='out').n_docs.values()) == len(WORDS)**2

def test_split_does_not_depend_on_the_company(here):
    ps = prose(600)
    for name,part in (('all', ps), ('half', ps[::2])): Path(f'{name}.jsonl').write_text('\n'.join(json.dumps(dict(text=t)) for t in part))
    a, h = (build_corpus(f'files:{n}.jsonl', out=n, near_dedup=False, val_frac=.2) for n in ('all', 'half'))
    assert set(h.docs('valid')) == set(a.docs('valid')) & set(ps[::2]) and .15 < a.n_docs['valid']/600 < .25

def test_max_bytes_and_shards(here, monkeypatch):
    Path('a.jsonl').write_text('\n'.join(json.dumps(dict(text=t)) for t in prose(2000)))
    c = build_corpus('files:a.jsonl', out='out', max_bytes=100_000)
    assert 99_000 < sum(c.n_bytes.values()) <= 100_000
    assert c.fingerprint == build_corpus('files:a.jsonl', out='out2', max_bytes=100_000).fingerprint
    monkeypatch.setattr(C._Shards.__init__, '__defaults__', (20_000, 200_000)); monkeypatch.setattr(C, 'PART', 10_000)
    many = build_corpus('files:a.jsonl', out='many'); whole = [*many.docs('train')]
    assert len(many.files('train')) > 3 and len(whole) == many.n_docs['train']
    assert pq.ParquetFile(many.files('train')[0]).num_row_groups > 5

def test_default_place_is_reused_until_the_input_changes(here):
    Path('a.txt').write_text('\n\n'.join(prose(60))); a = build_corpus('files:a.txt'); stamp = (a.path/'corpus.json').stat().st_mtime_ns
    assert a.path.parent == slm_home()/'corpora' and build_corpus('files:a.txt').path == a.path
    assert (a.path/'corpus.json').stat().st_mtime_ns == stamp
    assert build_corpus('files:a.txt', val_frac=.2).path != a.path
    Path('a.txt').write_text('\n\n'.join(prose(61))); assert build_corpus('files:a.txt').path != a.path

def test_a_damaged_copy_is_built_again(here):
    Path('a.txt').write_text('\n\n'.join(prose(60))); a = build_corpus('files:a.txt')
    a.files('train')[0].write_bytes(b''); b = build_corpus('files:a.txt')
    assert b.fingerprint == a.fingerprint and len([*b.docs('train')]) == b.n_docs['train']

def test_shakespeare_is_split_as_everyone_does(here, monkeypatch):
    text = ('First Citizen:\r\nHear me\tspeak.\n\n'*50)[:1003]; Path('s.txt').write_bytes(text.encode())
    import hashlib; monkeypatch.setattr(SOURCES['shakespeare'], 'sha256', hashlib.sha256(text.encode()).hexdigest())
    c = build_corpus('shakespeare:s.txt')
    assert [*c.docs('train')] == [text[:902]] and [*c.docs('valid')] == [text[902:]] # not one character changed
    assert c.license == 'public domain' and str(here) not in (c.path/'corpus.json').read_text()

def test_pydocs_is_deterministic_and_light(here):
    a = build_corpus('pydocs', out='a', max_bytes=600_000); b = build_corpus('pydocs', out='b', max_bytes=600_000)
    assert a.fingerprint == b.fingerprint and a.n_docs['train'] > 100 and a.n_docs['valid'] > 0
    code = "import sys; from slm.data.corpus import *; assert not {'torch', 'datasets', 'matplotlib', 'pandas'} & set(sys.modules)"
    subprocess.run([sys.executable, '-c', code], check=True, cwd=ROOT)

def test_plot_and_card(here):
    import matplotlib; matplotlib.use('Agg')
    c = build_corpus('pydocs', out='a', max_bytes=300_000); fig = c.plot()
    assert len(fig.axes) == 4 and all(ax.patches for ax in fig.axes) and 'PSF-2.0' in c.card()

# ---------------------------------------------------------------- bad input

def test_bad_files(here):
    fails('files:none*.txt', "no file matches 'none*.txt'")
    Path('d').mkdir(); fails('files:d', 'it is a folder', 'd/**/*.txt')
    Path('e.txt').write_text(''); fails('files:e.txt', 'is empty')
    Path('e.txt').write_text(' \n\n\t'); fails('files:e.txt', 'is empty')
    Path('one.txt').write_text('alone'); fails('files:one.txt', 'only one document left')
    Path('b.bin').write_bytes(bytes(range(256))*9); fails('files:b.bin', "'b.bin' is a binary file", 'offset 0')
    Path('u.txt').write_bytes('hello'.encode('utf-16')); fails('files:u.txt', 'UTF-16', '--encoding utf-16')
    os.mkfifo('pipe'); fails('files:pipe', 'not a regular file')
    os.symlink('nowhere', 'dangling.txt'); fails('files:dangling.txt', "cannot read 'dangling.txt'", 'No such file')
    Path('cut.txt.gz').write_bytes(gzip.compress(os.urandom(99_999).hex().encode())[:5000])
    fails('files:cut.txt.gz', 'cut.txt.gz', 'damaged')
    Path('no.txt.gz').write_bytes(b'never gzipped'); fails('files:no.txt.gz', 'no.txt.gz', 'damaged')
    Path('p.parquet').write_bytes(b'PAR1'); fails('files:p.parquet', "'p.parquet' is not a readable parquet file")
    pq.write_table(pa.table(dict(n=[1])), 'n.parquet'); fails('files:n.parquet', 'no text columns')
    pq.write_table(pa.table(dict(q=['a'], a=['b'])), 'qa.parquet'); fails('files:qa.parquet', 'its text columns are q, a')

@pytest.mark.skipif(not hasattr(os, 'geteuid') or os.geteuid() == 0, reason='root may read everything')
def test_unreadable_file(here):
    Path('s.txt').write_text('secret'); os.chmod('s.txt', 0); fails('files:s.txt', "cannot read 's.txt'", 'Permission denied')

def test_unreadable_file_by_the_system_call(here, monkeypatch):
    Path('s.txt').write_text('secret'); real = open
    def refuse(p, *a, **k):
        if str(p) == 's.txt': raise PermissionError(errno.EACCES, 'Permission denied')
        return real(p, *a, **k)
    monkeypatch.setattr(C, 'open', refuse, raising=False); fails('files:s.txt', "cannot read 's.txt' (Permission denied)")

@pytest.mark.parametrize('at', [0, 5, 1<<20, (1<<20)-1, (1<<20)+70_000])
def test_broken_utf8_is_found_by_file_and_offset(here, at):
    Path('ok.txt').write_text('fine'); Path('x.txt').write_bytes(b'a'*at + b'\xe9!' + b'b'*50)
    fails('files:*.txt', f"'x.txt' is not valid UTF-8: byte 0xe9 at offset {at:,}")

def test_broken_utf8_elsewhere(here):
    Path('t.txt').write_bytes('x€'.encode()[:-1]); fails('files:t.txt', 'offset 1') # ends inside a character
    Path('l.jsonl').write_bytes(b'{"text": "ok"}\n{"text": "caf\xe9"}\n')
    fails('files:l.jsonl', "'l.jsonl' is not valid UTF-8: byte 0xe9 at offset 28")
    Path('ok.txt').write_bytes(b'caf\xe9 one' + b' word'*200 + b'\n\n' + b'two '*300)
    c = build_corpus('files:ok.txt', out='r', errors='replace')
    assert any(t.startswith('caf\ufffd one') for t in texts(c))

def test_bad_jsonl(here):
    Path('l.jsonl').write_text('{"text": "ok"}\n\n{"text": "ok2"}\nnot json\n'); fails('files:l.jsonl', "'l.jsonl' line 4: it is not JSON")
    Path('l.jsonl').write_text('["text"]\n'); fails('files:l.jsonl', 'row 1: it is not a JSON object')
    Path('l.jsonl').write_text('{"text": "ok"}\n{"text": 5}\n'); fails('files:l.jsonl', "line 2: 'text' is not text but int")
    Path('l.jsonl').write_text('{"n": 5}\n'); fails('files:l.jsonl', "'l.jsonl' has no column 'text'", 'no text columns')

def test_half_an_emoji_leaves_one_row_out_named_and_counted(here, capsys):
    rows = '\n'.join(json.dumps(dict(text=t)) for t in ['half \ud83d emoji', 'a whole \U0001f600 emoji', 'fine'])
    Path('l.jsonl').write_text(rows); c = build_corpus('files:l.jsonl', out='r')
    assert sorted(texts(c)) == ['a whole \U0001f600 emoji', 'fine']
    assert c.info['left_out']['rows'] == 1
    assert "'l.jsonl' line 1: it holds half a character" in capsys.readouterr().err
    assert 'left out: unusable rows | 1' in c.card()

# ---------------------------------------------------------------- rows of other people's files

STORIES = [dict(title='Untitled', text=None)] + [dict(title=f'Title {i}', text=f'Story {i} of the otter, {i*i} words.') for i in range(60)]

@pytest.mark.parametrize('only', [False, True], ids=['titles too', 'text alone'])
@pytest.mark.parametrize('kind', ['jsonl', 'json', 'parquet'])
def test_a_first_row_without_text_does_not_choose_the_titles(here, kind, only):
    rows = [dict(text=r['text']) if only else r for r in STORIES]
    if kind == 'parquet': pq.write_table(pa.Table.from_pylist(rows), 'a.parquet')
    else: Path(f'a.{kind}').write_text(json.dumps(rows) if kind == 'json' else '\n'.join(map(json.dumps, rows)))
    c = build_corpus(f'files:a.{kind}', out='out')
    assert sorted(texts(c)) == sorted(r['text'] for r in STORIES[1:])
    assert c.info['columns'] == dict(text=1) and '| text column | text |' in c.card()

def test_a_column_of_nulls_is_not_replaced_by_another(here):
    pq.write_table(pa.table(dict(title=['a', 'b'], text=pa.nulls(2))), 'n.parquet')
    fails('files:n.parquet', 'there is no text in it')
    Path('n.jsonl').write_text('\n'.join(json.dumps(dict(title=f't{i}', text=None)) for i in range(9)))
    fails('files:n.jsonl', 'there is no text in it')

def test_texts_in_a_dictionary_of_parquet_are_texts(here):
    ps = prose(30); pq.write_table(pa.table(dict(text=pa.array(ps+ps[:3]).dictionary_encode())), 'd.parquet')
    assert sorted(texts(build_corpus('files:d.parquet', out='out'))) == sorted(ps)

@pytest.mark.parametrize('name', ['a.jsonl', 'a.json', 'a.jsonl.gz', 'a.json.gz', 'a.JSON', 'array.json', 'array.json.gz', 'array.jsonl'])
@pytest.mark.parametrize('mark', [b'', b'\xef\xbb\xbf'], ids=['plain', 'byte order mark'])
def test_rows_are_the_same_in_every_spelling(here, name, mark):
    rows = [dict(text='one, "two" [3]', n=[1, {}]), dict(text='\u732b \U0001f600'), dict(text=None)]
    said = mark + (json.dumps(rows, indent=1) if 'array' in name else '\n'.join(map(json.dumps, rows))).encode()
    Path(name).write_bytes(gzip.compress(said) if name.endswith('gz') else said)
    assert [r for _,r in read_rows(name)] == rows

@pytest.mark.parametrize('block', [1, 7, 1000])
def test_an_array_is_read_in_pieces_of_any_size(here, monkeypatch, block):
    real = C._blocks; monkeypatch.setattr(C, '_blocks', lambda path, errors='strict', n=0: real(path, errors, block))
    rows = [dict(text='x'*n, deep=[[n, -1.5e-3, True, None, '\u20ac\\"]']]) for n in range(40)]
    Path('a.json').write_text(json.dumps(rows, indent=2)); assert [r for _,r in read_rows('a.json')] == rows
    for bad,why in (('[{"a": 1}, {"b": tru}]', 'behind row 1 (it is not JSON'), ('[{"a": 1} {"b": 2}]', "no ',' but '{'"),
                    ('[{"a": 1}', 'has no end'), ('[{"a": 1}]\n[2]', 'goes on behind the end'), ('[{"a": 1},]', 'behind row 1')):
        Path('b.json').write_text(bad)
        with pytest.raises(SLMError, match=re.escape(why)): list(read_rows('b.json'))
    Path('b.json').write_text(' [ ] '); assert list(read_rows('b.json')) == []

def test_a_table_gives_its_text_column(here):
    Path('a.csv').write_text('\ufeffid,text\n1,"one, and\nmore"\n2,two\n'); Path('b.tsv').write_text('id\ttext\n1\tthree, four\n2\tfive\n')
    assert sorted(texts(build_corpus('files:*.?sv', out='out'))) == ['five', 'one, and\nmore', 'three, four', 'two']

def test_a_column_s_name_does_not_break_the_line(here):
    Path('a.csv').write_text('id,"a\nb"\n1,2\n'); fails('files:a.csv', 'its text columns are id, a b')

TEXT = '\n\n'.join(f'“Well,” said the heron, “it’s {i} – or not…”'*30 for i in range(30))

@pytest.mark.parametrize('encoding', ['utf-16', 'utf-16-le', 'windows-1252', 'UTF8', 'utf-8-sig'])
def test_an_encoding_that_is_named_is_read(here, encoding):
    Path('u.txt').write_text(TEXT, encoding='utf-8'); Path('a.txt').write_text(TEXT, encoding=encoding)
    a,u = build_corpus('files:a.txt', out='a', encoding=encoding),build_corpus('files:u.txt', out='u')
    assert ''.join(texts(a)).count('“Well,”') == ''.join(texts(u)).count('“Well,”') == 900
    Path('r.jsonl').write_text('\n'.join(json.dumps(dict(text=t), ensure_ascii=False) for t in TEXT.split('\n\n')), encoding=encoding)
    with text_encoding(encoding): assert [r['text'] for _,r in read_rows('r.jsonl')] == TEXT.split('\n\n')

@pytest.mark.parametrize('name,said', [('utf-16', 'utf-16'), ('windows-1252', 'windows-1252')])
def test_the_hint_of_an_encoding_is_true(here, name, said):
    Path('a.txt').write_text(TEXT, encoding=name); hint = re.search(r'--encoding (\S+)', fails('files:a.txt', '--encoding'))[1]
    assert hint == said and '“Well,”' in texts(build_corpus('files:a.txt', out='out', encoding=hint))[0]

def test_wrong_encodings(here):
    Path('a.txt').write_bytes(b'caf\x81 '*200)
    fails('files:a.txt', "'a.txt' is not cp1252", 'another --encoding', encoding='windows-1252')
    for bad in ('utf-99', 'zlib', 'rot13', 'a\0b'): fails('files:a.txt', 'unknown encoding', encoding=bad)

def test_brackets_of_a_folder_are_no_pattern(here):
    Path('Letters [1890]').mkdir(); Path('Letters [1890]/a [1].txt').write_text('\n\n'.join(prose(60)))
    a = build_corpus('files:Letters [1890]/*.txt', out='a'); b = build_corpus('files:Letters [1890]/a [1].txt', out='b')
    assert a.fingerprint == b.fingerprint == build_corpus(f'files:{here}/Letters [1890]/**/*.txt', out='c').fingerprint
    Path('x1.txt').write_text('x'); assert C._glob('x[12].txt') == ['x1.txt']

@pytest.mark.parametrize('size', [10_000, 1_000_000, 3_000_000])
def test_a_small_world_has_both_sides(here, size):
    c = build_corpus('world', out='w', max_bytes=size)
    assert c.n_docs['train'] > 5 and c.n_docs['valid'] >= 1 and sum(c.n_bytes.values()) <= size
    if size < 3_000_000: assert c.n_bytes['valid'] <= size/10

def test_a_world_too_small_says_the_least(here): fails('world', 'within 900 bytes', 'give 10,000 or more', max_bytes=900)

def test_bad_specs(here):
    Path('a.txt').write_text('x')
    fails('tinystorys', "did you mean 'tinystories'")
    fails('zzz', 'there are', 'files:GLOB', 'pydocs'); fails('a.txt', "did you mean 'files:a.txt'")
    fails('pydocs:x', 'takes nothing')
    fails('files', "write 'files:GLOB'"); fails('hf:', 'write'); fails('hf:a/b/c/d', 'write hf:OWNER/NAME')
    fails('pydocs', 'it is a share', val_frac=1.)
    fails('pydocs', 'at least 1', max_bytes=0); fails('pydocs', "'strict' or 'replace'", errors='ignore')

def test_wrong_shakespeare(here, monkeypatch):
    Path('s.txt').write_text('To be')
    fails('shakespeare:s.txt', 'SHA-256', 'files:s.txt'); fails('shakespeare:none.txt', "cannot read 'none.txt'")
    class Answer:
        def read(self): return b'<html>login</html>'
    monkeypatch.setattr(C.urllib.request, 'urlopen', lambda *a, **k: Answer()); fails('shakespeare', 'is not the file', 'shakespeare:PATH')
    def down(*a, **k): raise C.urllib.request.URLError('no route')
    monkeypatch.setattr(C.urllib.request, 'urlopen', down); fails('shakespeare', 'cannot download', 'no route', "'pydocs'")
    assert not (slm_home()/'downloads'/'tinyshakespeare.txt').exists()

def test_foreign_folder_is_not_overwritten(here):
    Path('out').mkdir(); Path('out/mine.txt').write_text('keep')
    with pytest.raises(SLMError, match='is not a corpus'): build_corpus('pydocs', out='out')
    assert Path('out/mine.txt').read_text() == 'keep'
    Path('file').write_text(''); 
    with pytest.raises(SLMError, match='file'): build_corpus('pydocs', out='file/x', max_bytes=9999)

def test_opening_what_is_no_corpus(here):
    Path('a.txt').write_text('\n\n'.join(prose(60))); c = build_corpus('files:a.txt', out='c')
    with pytest.raises(SLMError, match='no split'): c.files('test')
    info = json.loads(Path('c/corpus.json').read_text())
    for change,msg in ((dict(schema=99), 'newer version'), (dict(files=None), 'lacks')):
        bad = {k: v for k,v in (info | change).items() if v is not None}
        Path('c/corpus.json').write_text(json.dumps(bad))
        with pytest.raises(SLMError, match=msg): Corpus.open('c')
    Path('c/corpus.json').write_text('{'); 
    with pytest.raises(SLMError, match='not valid JSON'): Corpus.open('c')
    Path('c/corpus.json').write_text(json.dumps(info)); c.files('valid')[0].unlink()
    with pytest.raises(SLMError, match='is missing'): Corpus.open('c')

FULL = """
import resource, signal, sys
from slm.core import SLMError
from slm.data.corpus import build_corpus
signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), -1))
try: build_corpus('files:a.jsonl', out='out'); print('built')
except SLMError as e: print(e)
"""
@pytest.mark.parametrize('limit', [0, 20_000, 300_000]) # bytes that a file may have: no part of the stage fits
def test_no_space_left_by_a_real_limit(here, limit):
    rng = np.random.default_rng(0)
    Path('a.jsonl').write_text('\n'.join(json.dumps(dict(text=rng.bytes(400).hex())) for _ in range(900)))
    r = subprocess.run([sys.executable, '-c', FULL, str(limit)], capture_output=True, text=True,
                       env=os.environ | dict(PYTHONPATH=str(ROOT)))
    assert not r.returncode, r.stderr
    assert 'the disk is full' in r.stdout and r.stdout.count('\n') == 1 and not r.stderr, r.stdout + r.stderr
    assert sorted(p.name for p in here.iterdir() if p.name != 'home') == ['a.jsonl']

@pytest.mark.parametrize('where', ['stage', 'parquet', 'card'])
def test_no_space_left_at_each_step(here, monkeypatch, where):
    def full(*a, **k): raise OSError(errno.ENOSPC, 'No space left on device')
    if where == 'stage': monkeypatch.setattr(C._Stage, 'add', full)
    if where == 'parquet': monkeypatch.setattr(C.pq.ParquetWriter, 'write_table', full)
    write = C.write_json
    if where == 'card': monkeypatch.setattr(C, 'write_json', lambda p, o: full() if p.name == 'corpus.json' else write(p, o))
    Path('a.txt').write_text('\n\n'.join(prose(60)))
    if where == 'stage': fails('files:a.txt', 'the disk is full', 'make room'); return
    with pytest.raises(SLMError, match='the disk is full.*make room'): build_corpus('files:a.txt', out='out')
    assert sorted(p.name for p in here.iterdir() if p.name != 'home') == ['.out.stage', 'a.txt']
    monkeypatch.undo(); monkeypatch.chdir(here); monkeypatch.setenv('SLM_HOME', str(here/'home'))
    assert build_corpus('files:a.txt', out='out').n_docs['train'] > 9 and not Path('.out.stage').exists()

def test_an_old_corpus_survives_a_failed_rebuild(here, monkeypatch):
    Path('a.txt').write_text('\n\n'.join(prose(60))); a = build_corpus('files:a.txt', out='c')
    def die(*args, **k): raise KeyboardInterrupt
    monkeypatch.setattr(C, '_pass2', die)
    with pytest.raises(KeyboardInterrupt): build_corpus('files:a.txt', out='c', rebuild=True)
    assert Corpus.open('c').fingerprint == a.fingerprint
    assert sorted(p.name for p in here.iterdir() if p.name != 'home') == ['a.txt', 'c'] # who rebuilds begins anew

@pytest.mark.parametrize('where', ['_pass2', 'fsync'])
def test_what_was_found_out_while_reading_is_not_lost(here, monkeypatch, where):
    "Interrupted behind pass 1, or when all is made and on its way to its place: the card says what an undisturbed one says"
    rows = [json.dumps(dict(story=p)) for p in prose(60)]; rows.insert(7, '{"story": "half \\ud83d"}')
    Path('a.jsonl').write_text('\n'.join(rows)); want = build_corpus('files:a.jsonl', out='want')
    def die(*args, **k): raise KeyboardInterrupt
    with monkeypatch.context() as m:
        if where == '_pass2': m.setattr(C, '_pass2', die)
        else: m.setattr('slm.core._exchange', die); m.setattr('slm.core.os.rename', die)
        with pytest.raises(KeyboardInterrupt): build_corpus('files:a.jsonl', out='c')
    assert not Path('c').exists() and Path('.c.stage').is_dir()
    monkeypatch.setattr(C, '_pass1', die); got = build_corpus('files:a.jsonl', out='c') # nothing is read again
    assert got.fingerprint == want.fingerprint and not Path('.c.stage').exists()
    for k in ('left_out', 'columns', 'license', 'revision'): assert got.info[k] == want.info[k], k
    assert got.info['left_out']['rows'] == 1 and got.info['columns'] == {'story': 1}

@pytest.mark.parametrize('damage', ['npy', 'arrow', 'json'])
def test_a_damaged_stage_is_none(here, monkeypatch, damage):
    Path('a.txt').write_text('\n\n'.join(prose(60))); want = build_corpus('files:a.txt', out='want')
    def die(*args, **k): raise KeyboardInterrupt
    with monkeypatch.context() as m:
        m.setattr(C, '_pass2', die)
        with pytest.raises(KeyboardInterrupt): build_corpus('files:a.txt', out='c')
    for p in Path('.c.stage').glob(f'*.{damage}'): p.write_text('[]')
    assert build_corpus('files:a.txt', out='c').fingerprint == want.fingerprint and not Path('.c.stage').exists()

def test_rows_left_out_do_not_depend_on_the_processors(here, monkeypatch):
    "With a limit, what is read ahead of it is not reported"
    monkeypatch.setattr(C, 'PART', 10_000); said = []
    rows = [json.dumps(dict(text=p)) if i%3 else '{"text": "half \\ud83d"}' for i,p in enumerate(prose(900))]
    Path('a.jsonl').write_text('\n'.join(rows))
    for n in (1, 8):
        monkeypatch.setattr(C, 'num_cpus', lambda: n); c = build_corpus('files:a.jsonl', out=f'c{n}', max_bytes=60_000)
        said.append((c.fingerprint, c.info['left_out']['rows']))
    assert said[0] == said[1] and 0 < said[0][1] < 150

KILLED = '''
import os, sys
import slm.data.corpus as C
C.PART, parts = 20_000, int(sys.argv[1])
end_part = C._Stage.end_part
def counted(self, *args, **kw):
    end_part(self, *args, **kw)
    if self.parts == parts: os.kill(os.getpid(), 9)
C._Stage.end_part = counted
print(C.build_corpus('files:*.jsonl', out='c').fingerprint)
'''
@pytest.mark.parametrize('parts', [1, 3])
def test_a_killed_build_goes_on(here, parts):
    "SIGKILL behind a finished part: the next call reads the rest, and makes the corpus that an undisturbed one makes"
    ps = prose(700); ps += ps[:50]+[ps[60].replace('the', 'thy', 1)]
    for i in range(2): Path(f'{i}.jsonl').write_text('\n'.join(json.dumps(dict(text=p)) for p in ps[i*400:(i+1)*400]))
    whole = build_corpus('files:*.jsonl', out='whole')
    r = subprocess.run([sys.executable, '-c', KILLED, str(parts)], capture_output=True, env=os.environ | dict(PYTHONPATH=str(ROOT)))
    assert r.returncode == -9, r.stderr
    numbers = [np.load(p) for p in Path('.c.stage').glob('*.npy')]; assert len(numbers) == parts
    done = sum(n.shape[1] for n in numbers); assert 30*parts < done < len(ps)
    prepare, ready = C._prepare, []
    C._prepare = lambda where, texts, **kw: (ready.append(len(texts)), prepare(where, texts, **kw))[1]
    try: c = build_corpus('files:*.jsonl', out='c')
    finally: C._prepare = prepare
    assert c.fingerprint == whole.fingerprint and texts(c) == texts(whole) and c.stats == whole.stats
    assert sum(ready) == len(ps)-done and not Path('.c.stage').exists()          # nothing that was finished was made again

# ---------------------------------------------------------------- the hub

def test_hub_unreachable_is_one_quick_line(here, monkeypatch):
    from huggingface_hub import HfApi
    def down(*a, **k): raise ConnectionError('Name or service not known\nand a long tail')
    monkeypatch.setattr(HfApi, 'dataset_info', down)
    for spec in ('tinystories', 'fineweb-edu', 'wikitext', 'wikipedia', 'hf:owner/name:story'):
        fails(spec, 'cannot reach the Hugging Face hub', "'pydocs'", "'files:GLOB'", "'shakespeare:PATH'")

@pytest.fixture
def hub(here, monkeypatch):
    "`datasets` streams for real, from a local parquet file in the hub's place"
    import datasets; from huggingface_hub import HfApi
    real, asked = datasets.load_dataset, []
    def load(repo, config, split, streaming, revision):
        asked.append((repo, config, split, streaming, revision))
        return real('parquet', data_files={'train': 'hub.parquet'}, split=split, streaming=streaming)
    monkeypatch.setattr(datasets, 'load_dataset', load)
    monkeypatch.setattr(HfApi, 'dataset_info', lambda self, repo, revision=None,
                        timeout=None: types.SimpleNamespace(sha='c0ffee', card_data={'license': 'cc0-1.0'}))
    return asked

def test_hub_streams_into_a_corpus(hub):
    ps = prose(300); pq.write_table(pa.table(dict(id=range(300), text=ps)), 'hub.parquet')
    c = build_corpus('tinystories', out='t')
    assert sorted(texts(c)) == sorted(ps) and c.info['revision'] == 'c0ffee' and c.license == 'CDLA-Sharing-1.0'
    assert hub == [('roneneldan/TinyStories', None, 'train', True, 'c0ffee')]
    assert build_corpus('fineweb-edu', out='f', max_bytes=5000).n_docs['train'] > 5
    assert hub[-1][:2] == ('HuggingFaceFW/fineweb-edu', 'sample-10BT')

def test_any_hub_set_and_its_columns(hub):
    ps = prose(50); pq.write_table(pa.table(dict(title=['t']*50, story=ps)), 'hub.parquet')
    c = build_corpus('hf:some/one/small:story', out='s')
    assert sorted(texts(c)) == sorted(ps) and c.name == 'hf:some/one' and c.license == 'cc0-1.0' and hub[-1][:2] == ('some/one', 'small')
    fails('hf:some/one', "no column 'text': its text columns are title, story")
    fails('hf:some/one:body', "no column 'body'", 'title, story')

def test_wikitext_lines_become_articles(hub):
    arts = [[f' = Article {i} = \n', '', f' {p} \n', ' = = Part = = \n', f' more {p} \n'] for i,p in enumerate(prose(40))]
    pq.write_table(pa.table(dict(text=sum(arts, []))), 'hub.parquet'); c = build_corpus('wikitext', out='w')
    assert sorted(texts(c)) == sorted(''.join(a).strip('\n') for a in arts) and c.info['sha256'] is None

def test_hub_faults(hub, monkeypatch):
    import datasets
    def no_config(*a, **k): raise ValueError("Config name is missing.\nPick one of ['a', 'b']")
    monkeypatch.setattr(datasets, 'load_dataset', no_config); fails('hf:some/one', 'Config name is missing', 'hf:OWNER/NAME/CONFIG')

def nothing(): yield from ()
def test_a_hub_set_without_rows(hub, monkeypatch):
    import datasets
    monkeypatch.setattr(datasets, 'load_dataset', lambda *a, **k: datasets.IterableDataset.from_generator(nothing))
    fails('hf:some/one', 'no rows')

# ---------------------------------------------------------------- the hub, over HTTP

def hub_set(n_files=3, rows=400):
    "A data set of parquet files for a stand-in hub; returns its texts in order"
    folder, ps = Path('served/some/one'), prose(n_files*rows, least=60, most=200); folder.mkdir(parents=True)
    for i in range(n_files):
        part = ps[i*rows:(i+1)*rows]
        table = pa.table(dict(text=part, url=[f'http://x/{j}' for j in range(rows)]))
        pq.write_table(table, folder/f'train-{i:05}-of-{n_files:05}.parquet', row_group_size=100)
    return ps

FETCH = """
import json, sys, time, types
import datasets, huggingface_hub.utils._http as http
http.time = types.SimpleNamespace(**vars(time) | dict(sleep=lambda s: time.sleep(min(s, .05)))) # nobody waits for a server that is ours
datasets.config.STREAMING_READ_MAX_RETRIES = int(sys.argv[2])
for k in ('READ', 'OPEN', 'READ_SERVER_UNAVAILABLE', 'READ_RATE_LIMIT'):
    setattr(datasets.config, f'STREAMING_{k}_RETRY_INTERVAL', .05)
from slm.core import SLMError
import slm.data.corpus as C
C.PART = int(sys.argv[3])
try: c = C.build_corpus(sys.argv[1], out='out')
except SLMError as e: print(e); sys.exit(2)
print(json.dumps(dict(fingerprint=c.fingerprint, docs=sum(c.n_docs.values()), revision=c.info['revision'], license=c.license)))
"""
def fetch(url, retries=3, part=40_000, spec='hf:some/one'):
    "Build a corpus from a hub at `url` with its real clients, in a process of its own"
    env = os.environ | dict(PYTHONPATH=str(ROOT), HF_ENDPOINT=url, HF_HUB_DISABLE_TELEMETRY='1', HF_HOME=str(Path('hf').absolute()),
                            NO_PROXY='127.0.0.1', TQDM_DISABLE='1')
    env.pop('HF_HUB_OFFLINE', None); env.pop('HF_DATASETS_OFFLINE', None)
    return subprocess.run([sys.executable, '-c', FETCH, spec, str(retries), str(part)], capture_output=True, text=True, env=env,
                          timeout=300)

def test_a_stream_survives_cuts_and_refusals(here):
    "Connections that are dropped half-way, 429 and 503: the corpus is the one that a calm network gives"
    ps = hub_set()
    with Hub('served') as calm: want = fetch(calm.url)
    assert not want.returncode, want.stdout+want.stderr
    want = json.loads(want.stdout); assert want['docs'] == len(ps) and want['revision'] == SHA and want['license'] == 'cc0-1.0'
    shutil.rmtree('out')
    with Hub('served', faults={2: 'cut', 4: 429, 5: 503, 7: 'cut'}) as stormy: got = fetch(stormy.url)
    assert not got.returncode, got.stdout+got.stderr
    assert json.loads(got.stdout) == want
    codes = [c for _,_,c in stormy.log]; assert {429, 503, 'dropped'} <= set(codes), codes

def test_a_stream_that_breaks_off_goes_on_where_it_was(here):
    "The hub dies for good after some requests; the next call reads only what is missing"
    ps = hub_set(5)                                                              # the first thousand rows decide which column is the text
    with Hub('served') as calm: want = json.loads(fetch(calm.url).stdout); all_bytes = calm.sent
    shutil.rmtree('out')
    with Hub('served', dies_after=9) as dying: broken = fetch(dying.url)
    assert broken.returncode == 2 and 'broke off after' in broken.stdout and 'run it again' in broken.stdout, broken.stdout+broken.stderr
    assert 'run the same call again to go on' in broken.stderr and not Path('out').exists() and Path('.out.stage').is_dir()
    kept = json.loads(Path('.out.stage/stage.json').read_text())
    assert kept['parts'] > 1 and 100 < kept['behind']['place']['rows'] < len(ps)
    away = fetch('http://127.0.0.1:9')                                           # still not there: what was read waits
    assert away.returncode == 2 and 'cannot reach' in away.stdout and Path('.out.stage').is_dir(), away.stdout
    with Hub('served') as back: got = fetch(back.url)
    assert not got.returncode, got.stdout+got.stderr
    assert json.loads(got.stdout) == want and not Path('.out.stage').exists()
    assert back.sent < .8*all_bytes, (back.sent, all_bytes)                      # the finished files were not asked for again

def test_no_such_data_set(here, monkeypatch):
    import httpx
    from huggingface_hub import HfApi; from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
    def raising(cls):
        def f(*a, **k): raise cls.__new__(cls)
        return f
    monkeypatch.setattr(HfApi, 'dataset_info', raising(RepositoryNotFoundError)); fails('hf:no/body', "no public data set 'no/body'")
    monkeypatch.setattr(HfApi, 'dataset_info', raising(GatedRepoError)); fails('hf:no/body', 'gated', 'hf auth login')

@pytest.mark.slow
def test_the_real_hub(here): # needs the network
    try: c = build_corpus('tinystories', out='t', max_bytes=1_000_000)
    except SLMError as e:
        if 'cannot reach' in str(e): pytest.skip(str(e))
        raise
    assert c.n_docs['train'] > 500 and len(c.info['revision']) == 40

# ---------------------------------------------------------------- memory

MEASURE = r"""
import re, resource, sys
from slm.data.corpus import build_corpus
c = build_corpus('files:'+sys.argv[1], out='out')
# ru_maxrss would count the parent's too
if sys.platform == 'linux': mb = int(re.search(r'VmHWM:\s*(\d+)', open('/proc/self/status').read())[1]) >> 10
else: mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 20
print(sum(c.n_docs.values()), mb)
"""
def peak_mb(path):
    r = subprocess.run([sys.executable, '-c', MEASURE, str(path)], capture_output=True, text=True,
                       env=os.environ | dict(PYTHONPATH=str(ROOT)))
    assert not r.returncode, r.stderr
    n, mb = map(int, r.stdout.split()); return n, mb

def write_big(path, n_bytes, least=60, most=400):
    rng, done, k = np.random.default_rng(0), 0, 0
    vocab = np.array([''.join(chr(97+c) for c in rng.integers(0, 26, rng.integers(2, 9))) for _ in range(20_000)], dtype=object)
    with open(path, 'w') as f:
        while done < n_bytes: done += f.write(' '.join(vocab[rng.integers(0, 20_000, rng.integers(least, most))]) + '\n\n')

def test_memory_does_not_grow_with_the_input(here):
    write_big('small.txt', 8e6); write_big('large.txt', 80e6)
    (_, small), (n, large) = peak_mb('small.txt'), peak_mb('large.txt')
    # MB; 72 MB more input, most of the growth is the allocators' slack
    assert n > 5000 and large < 500 and large - small < 120, (small, large)

@pytest.mark.slow
def test_a_gigabyte_in_less_than_a_gigabyte(here):
    write_big('big.txt', 1e9); n, mb = peak_mb('big.txt'); assert mb < 1000, mb
