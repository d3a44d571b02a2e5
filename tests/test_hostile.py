"""Files, folders and requests from people who mean harm: each is one line of refusal, in bounded time and memory.

Every hostile act runs in a process of its own with a limit on address space and processor time."""
import os, resource, subprocess, sys, textwrap

import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

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

READ = """
from slm.core import SLMError
from slm.data.corpus import build_corpus, read_rows
def said(row): return row if isinstance(row, str) else 'a row'
try: print(*(f'{w}: {said(r)}' for w,r in read_rows(NAME)), sep='\\n')
except SLMError as e: print(f'slm: {e}')
"""
def reads(name, cwd, **kw): # the lines that a bounded process says of a file
    code, out, err = bounded(READ.replace('NAME', repr(name)), cwd, **(dict(memory=3*GB) | kw))
    assert code == 0 and not err, err
    return out.splitlines()

def long_text(f, head, tail, mb): # head, so many megabytes of a, tail
    f.write(head)
    for _ in range(mb): f.write(b'a'*(1<<20))
    f.write(tail)

def test_a_line_of_200_megabytes_is_one_row_left_out(tmp_path):
    with open(tmp_path/'a.jsonl', 'wb') as f: long_text(f, b'{"text": "ok"}\n{"text": "', b'"}\n{"text": "ok"}\n', 200)
    assert reads('a.jsonl', tmp_path, memory=2*GB) == ['line 1: a row', 'line 2: it is longer than 64 MB', 'line 3: a row']

def test_an_array_with_a_row_of_200_megabytes_is_one_line(tmp_path):
    with open(tmp_path/'a.json', 'wb') as f: long_text(f, b'[{"text": "ok"}, {"text": "', b'"}]', 200)
    (line,) = reads('a.json', tmp_path)
    assert line.startswith("slm: cannot read 'a.json' behind row 1 (it is longer than 64 MB)")

def test_a_gzip_bomb_takes_no_memory(tmp_path):
    import gzip
    with open(tmp_path/'a.jsonl.gz', 'wb') as f:
        f.write(gzip.compress(b'{"text": "ok"}\n{"text": "'))
        part = gzip.compress(b'a'*(64<<20))
        for _ in range(24): f.write(part) # 1.5 gigabytes
        f.write(gzip.compress(b'"}\n'))
    assert reads('a.jsonl.gz', tmp_path, memory=2*GB) == ['line 1: a row', 'line 2: it is longer than 64 MB']

@pytest.mark.parametrize('nested', [False, True])
def test_parquet_that_repeats_one_long_text(tmp_path, nested):
    import pyarrow as pa, pyarrow.parquet as pq
    text = pa.DictionaryArray.from_arrays(pa.array([0]*1000, pa.int32()), ['a'*(5<<20)]) # a thousand rows are five gigabytes
    if nested: text = pa.ListArray.from_arrays(pa.array(range(1001), pa.int32()), pa.StructArray.from_arrays([text], ['content']))
    pq.write_table(pa.table(dict(x=text)), tmp_path/'b.parquet', write_statistics=False)
    assert (tmp_path/'b.parquet').stat().st_size < 1e6
    assert reads('b.parquet', tmp_path, memory=4*GB) == [f'row {i}: a row' for i in range(1, 1001)]

def test_parquet_that_unpacks_to_a_gigabyte(tmp_path):
    import pyarrow as pa, pyarrow.parquet as pq
    text = pa.chunked_array([pa.array(['x'*(64<<20)])]*18)
    pq.write_table(pa.table(dict(text=text)), tmp_path/'a.parquet', compression='zstd', use_dictionary=False, write_statistics=False)
    (line,) = reads('a.parquet', tmp_path)
    assert "'a.parquet' unpacks" in line and 'smaller ones' in line

@pytest.mark.parametrize('bad', ['['*100_000, '{"a": '*100_000, '{"a": %s}' % ('9'*100_000), '{"a": 1e999999}', '{"a": "\\ud83d"}', '\\ufeff'*99,
                                 'null', '"\\u0000"', '{"a": NaN', '{"a": tru}'])
@pytest.mark.parametrize('name', ['a.jsonl', 'a.json', 'a.csv', 'a.parquet', 'a.jsonl.gz', 'a.txt'])
def test_broken_rows_are_one_line_each(tmp_path, name, bad):
    from slm.core import SLMError
    from slm.data.corpus import read_rows
    (tmp_path/name).write_text(bad+'\n')
    try: rows = list(read_rows(tmp_path/name))
    except SLMError as e: assert '\n' not in str(e) and name in str(e)
    else: assert all(len(str(r)) < 300_000 for _,r in rows)

ROWS = [dict(text='one, "two"', n=[1, {'a': None}]), dict(text='\u732b \U0001f600 \\ud83d'), dict(text=None, n=[])]*3

def spellings(): # name, and its bytes
    import gzip, io, json, pyarrow as pa, pyarrow.parquet as pq
    f = io.BytesIO(); pq.write_table(pa.table(dict(text=[str(r['text']) for r in ROWS], m=[[dict(role='user', content='a')]]*len(ROWS))), f)
    lines = '\n'.join(map(json.dumps, ROWS)).encode()
    return {'a.jsonl': lines, 'a.json': json.dumps(ROWS, indent=1).encode(), 'a.jsonl.gz': gzip.compress(lines, mtime=0), 'a.csv': b'id,text\n1,"a\nb"\n2,c\n',
            'a.parquet': f.getvalue(), 'b.jsonl': lines.decode().encode('utf-16')}

SPELLINGS = spellings()
EDIT = st.tuples(st.integers(0, 10**6), st.integers(0, 4), st.one_of(st.binary(max_size=6), st.sampled_from([b'[', b']', b'{', b'"', b'\\ud83d', b'\xef\xbb\xbf', b'\0', b'\n'])))

@given(st.sampled_from(sorted(SPELLINGS)), st.lists(EDIT, max_size=5), st.sampled_from(['utf-8', 'utf-16', 'windows-1252', 'utf-7']))
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_the_reader_of_rows_survives_any_edit(tmp_path, name, edits, encoding):
    from slm.core import SLMError
    from slm.data.corpus import read_rows, text_encoding, text_rows
    data = SPELLINGS[name]
    for at,cut,new in edits: at %= len(data)+1; data = data[:at]+new+data[at+cut:]
    (tmp_path/name).write_bytes(data)
    for read in (read_rows, lambda p: text_rows(p)[1]):
        try:
            with text_encoding(encoding):
                for where,row in read(tmp_path/name): assert isinstance(row, dict) or row and '\n' not in row, (where, row)
        except SLMError as e: assert '\n' not in str(e) and name in str(e)

# ---- requests

# ---- indexes
