"""Files, folders and requests from people who mean harm: each is one line of refusal, in bounded time and memory.

Every hostile act runs in a process of its own with a limit on address space and processor time."""
import os, resource, subprocess, sys, textwrap

import pytest

GB = 2**30

def bounded(code, cwd, memory=4*GB, cpu=60, wall=300):
    "Run Python `code` in a process that may use `memory` bytes of address space and `cpu` seconds; its exit code, stdout, stderr"
    def limits():
        resource.setrlimit(resource.RLIMIT_AS, (memory, memory)); resource.setrlimit(resource.RLIMIT_CPU, (cpu, cpu))
    r = subprocess.run([sys.executable, '-c', textwrap.dedent(code)], cwd=cwd, preexec_fn=limits, capture_output=True, text=True,
                       timeout=wall, env=os.environ | dict(OMP_NUM_THREADS='1', TQDM_DISABLE='1'))
    return r.returncode, r.stdout, r.stderr

# ---- runs and checkpoints

# ---- models and tokenizers

# ---- data

# ---- requests

# ---- indexes

INDEX = '''
    import json, os, shutil, sqlite3, sys, pathlib
    from slm.core import SLMError
    from slm.serve.rag import Document, Index
    d = pathlib.Path('ix')
    ix = Index(d, writable=True, embeddings='none'); ix.upsert([Document(f'd{i}', f'An old lamp {i}.') for i in range(9)]); ix.close()
    card = lambda **kw: (d/'config.json').write_text(json.dumps(json.loads((d/'config.json').read_text()) | kw))
    def rehash():
        import hashlib
        card(files={p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in d.iterdir() if p.name != 'config.json'})
    def sql(*statements, file='documents'):
        db = sqlite3.connect(d/file); [db.execute(s) for s in statements]; db.commit(); db.close(); rehash()
'''
EVIL_INDEX = dict(
    functions="card(functions=[dict(name='sh', function='os.system')])", content="card(content='os.system')", backend="card(backend='os.system')",
    scoring="card(scoring=dict(method='os.system', terms=True))", expressions="card(expressions=[dict(name='x', expression='sh(1)')])",
    view="sql('ALTER TABLE sections RENAME TO s0', 'CREATE VIEW sections AS SELECT * FROM s0 WHERE randomblob(3000000000) IS NOT NULL')",
    trigger="sql('CREATE TRIGGER t AFTER DELETE ON sections BEGIN DELETE FROM documents; END')",
    wal="sql('PRAGMA journal_mode=WAL')", table="sql('CREATE TABLE more(a)', file='scoring.terms')",
    pickle="(d/'scoring').write_bytes(b'cos\\nsystem\\n(S\\'touch pwned\\'\\ntR.'); rehash(); os.environ['ALLOW_PICKLE'] = 'True'",
    config="(d/'config').write_bytes(b'cos\\nsystem\\n(S\\'touch pwned\\'\\ntR.')", link="(d/'scoring').unlink(); (d/'scoring').symlink_to('/dev/zero')",
    fifo="(d/'documents').unlink(); os.mkfifo(d/'documents')", flipped="b = bytearray((d/'documents').read_bytes()); b[-1] ^= 1; (d/'documents').write_bytes(b)",
    vectors="(d/'embeddings').write_bytes(b'IxMp'+b'\\xff'*400); card(embeddings='x', probe=[1.]); rehash()", deep="(d/'config.json').write_text('['*10**5)")

def test_an_index_from_an_enemy_is_refused_and_runs_nothing(tmp_path):
    pytest.importorskip('txtai', reason='needs: pip install txtai')
    code, out, err = bounded(textwrap.dedent(INDEX)+f"evil = {EVIL_INDEX!r}\nshutil.copytree(d, 'whole')\n"+'''
for kind,act in evil.items():
    shutil.rmtree(d); shutil.copytree('whole', d); exec(act)
    try: Index(d); said = 'opened'
    except SLMError as e: said = 'refused' if len(str(e).splitlines()) == 1 else 'talked'
    print(kind, said, 'pwned' if os.path.exists('pwned') else 'safe')''', tmp_path, memory=8*GB)
    assert code == 0, err
    assert out.splitlines() == [f'{kind} refused safe' for kind in EVIL_INDEX]

QUERIES = ["select randomblob(3000000000) from txtai", "select id from txtai where length(randomblob(3000000000)) > 1",
           "select hex(zeroblob(1000000000)) from txtai where similar('lamp')", "select id from txtai where id in (select id from sections)",
           "select sql from txtai union select sql from sqlite_master", "select id from txtai where similar('a') limit 99999999",
           "select id from txtai where similar('lamp') order by randomblob(3000000000)", "select load_extension('x') from txtai", "select * from txtai"]

def test_sql_that_eats_memory_is_refused(tmp_path):
    pytest.importorskip('txtai', reason='needs: pip install txtai')
    code, out, err = bounded(textwrap.dedent(INDEX)+f'''
ix = Index(d)
for q in {QUERIES!r}:
    try: ix.query(q); print('answered', q)
    except SLMError: print('refused')
print(len(ix.query("select id from txtai where similar('lamp') and id != 'd1#0'")))''', tmp_path, memory=8*GB)
    assert code == 0, err
    assert out.splitlines() == ['refused']*len(QUERIES)+['8']

def test_what_gets_past_the_parser_stops_at_the_authorizer_or_the_clock(tmp_path):
    pytest.importorskip('txtai', reason='needs: pip install txtai')
    code, out, err = bounded(textwrap.dedent(INDEX)+'''
from slm.serve import rag
ix = Index(d); rag.QUERY_SECONDS = .2
for q in ('select randomblob(9) x from txtai', 'select id from txtai where similar(:v0) and id in (select a.id from sections a, sections b, sections c, '
          'sections d, sections e, sections f, sections g, sections h, sections i, sections j where a.text > j.text)'):
    try: ix._ask(lambda: ix._find(q, 3, 0., dict(v0='lamp'))); print('answered')
    except SLMError as e: print('refused:', e)
print(len(ix.query('lamp')))''', tmp_path, memory=8*GB)
    assert code == 0, err
    assert out.count('refused: ') == 2 and out.endswith('\n9\n'), out

def test_any_bytes_in_an_index_are_one_line_or_an_index(tmp_path):
    pytest.importorskip('txtai', reason='needs: pip install txtai')
    code, out, err = bounded(textwrap.dedent(INDEX)+'''
from hypothesis import HealthCheck, given, settings, strategies as st
shutil.copytree(d, 'whole'); counts = dict(opened=0, refused=0)
json_ = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(), lambda s: st.lists(s) | st.dictionaries(st.text(), s), max_leaves=5)
names = st.sampled_from(['documents', 'scoring', 'scoring.terms', 'config.json'])
change = st.tuples(names, st.integers(0, 2**14), st.binary(min_size=1, max_size=8), st.booleans())
keys = st.sampled_from(['format', 'offset', 'dimensions', 'embeddings', 'probe', 'sources', 'files', 'language', 'functions'])
@settings(max_examples=int(os.environ.get('SLM_FUZZ', 40)), deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
@given(st.lists(change, max_size=3), st.dictionaries(keys, json_, max_size=2))
def fuzz(changes, says):
    shutil.rmtree(d); shutil.copytree('whole', d)
    for name,at,new,cut in changes:
        b = (d/name).read_bytes(); at %= len(b); (d/name).write_bytes(b[:at]+new+(b'' if cut else b[at+len(new):]))
    try: rehash()
    except (ValueError, TypeError): pass
    try: card(**says) if says else None
    except (ValueError, TypeError): pass
    try:
        ix = Index(d, embeddings='none'); counts['opened'] += 1
        try: ix.search('old lamp'); ix.query("select id from txtai where similar('lamp')"); len(ix)
        finally: ix.close()
    except SLMError as e: counts['refused'] += 1; assert len(str(e).splitlines()) == 1, str(e)
fuzz(); print(counts['opened'] > 0, counts['refused'] > 0)''', tmp_path, memory=8*GB, cpu=int(os.environ.get('SLM_FUZZ', 40))+120)
    assert (code, out) == (0, 'True True\n'), err[-2000:]
