"""Files, folders and requests from people who mean harm: each is one line of refusal, in bounded time and memory.

Every hostile act runs in a process of its own with a limit on address space and processor time."""
import json, os, re, resource, subprocess, sys, tempfile, textwrap
from pathlib import Path
from types import SimpleNamespace

import forked, pytest
from hypothesis import HealthCheck, given, settings, strategies as st

GB = 2**30

def bounded(code, cwd, memory=4*GB, cpu=60, wall=300):
    "Run Python `code` in a process that may use `memory` bytes of address space and `cpu` seconds; its exit code, stdout, stderr"
    code = textwrap.dedent(code)
    if memory >= 4*GB: r = forked.run(code=code, cwd=cwd, memory=memory, cpu=cpu, timeout=wall)
    else:                                                                        # less than PyTorch's address space: without it
        def limits():
            resource.setrlimit(resource.RLIMIT_AS, (memory, memory)); resource.setrlimit(resource.RLIMIT_CPU, (cpu, cpu))
        env = os.environ | dict(OMP_NUM_THREADS='1')
        r = subprocess.run([sys.executable, '-c', code], cwd=cwd, preexec_fn=limits, capture_output=True, text=True, timeout=wall, env=env)
    return r.returncode, r.stdout, r.stderr

# ---- runs and checkpoints

RUN = dict(schema=1, stage='pretrain', status='interrupted', config={}, metrics={}, data=dict(fingerprint='f'), started='2026')

def run_folder(path, state=None, **info):
    "A run with one checkpoint"
    (path/'checkpoints'/'00000001').mkdir(parents=True); (path/'run.json').write_text(json.dumps(RUN | info))
    state = dict(step=1, tokens=1, loader=dict(epoch=0, pos=0), rng={}, optim={}) | (state or {})
    (path/'checkpoints'/'00000001'/'state.json').write_text(json.dumps(state)); return path

def said(code, cwd, **limits):
    "The one line of a verb that refuses"
    rc,out,err = bounded(code, cwd, **limits)
    assert rc == 2 and err.startswith('slm: error: ') and err.count('\n') == 1, (rc, out, err[-2000:])
    return err

SLM = "import sys; from slm.cli import main; sys.argv = ['slm', *{args!r}]; main()"
def slm(*args): return SLM.format(args=args)

@pytest.mark.parametrize('key', ['reward', 'judge'])
@pytest.mark.parametrize('kept', ['state.json', 'run.json'])
def test_code_that_a_run_names_is_not_run(key, kept, tmp_path):
    named = dict(base='.', data='world', reward='judge', judge=None) | {key: 'evil:reward'}
    (tmp_path/'evil.py').write_text("open('done', 'w').write('harm')\ndef reward(prompts, answers): return [0.]*len(answers)")
    info = dict(stage='rlhf', config=named if kept == 'run.json' else dict(named, **{key: 'judge'}))
    run_folder(tmp_path/'run', dict(sources=named if kept == 'state.json' else {}), **info)
    for name in ('run.json', 'checkpoints'): os.rename(tmp_path/'run'/name, tmp_path/name)
    assert f'--{key} evil:reward' in said(slm('resume', '.'), tmp_path)
    assert not (tmp_path/'done').exists()

def bad_json(path, kind):
    "Something else than a good file"
    if kind == 'fifo': return os.mkfifo(path)
    if kind == 'folder': return path.mkdir()
    if kind == 'endless': return path.symlink_to('/dev/zero')
    if kind == 'huge':
        with path.open('wb') as f: f.truncate(20*GB)
        return
    text = dict(digits='{"schema": 1, "stage": "a", "status": "done", "config": {}, "metrics": {}, "seed": %s}' % ('9'*5000),
                deep='['*100_000, deep_objects='{"a":'*100_000, no_object='[1, 2]', null='null', half='{"schema": 1', latin='{"a": "\xe9"}',
                figure=json.dumps(RUN | dict(metrics=dict(bpb=3))), kinds=json.dumps(RUN | dict(stage=['a'])),
                started=json.dumps(RUN | dict(started=3)),
                figures=json.dumps(RUN | dict(metrics=dict(bpb=dict(value=10**400)))))[kind]
    path.write_bytes(text.encode('latin-1'))

BAD = 'fifo folder endless huge digits deep deep_objects no_object null half latin figure kinds started figures'.split()

def test_one_bad_run_does_not_hide_the_others(tmp_path):
    run_folder(tmp_path/'runs'/'good')
    for kind in BAD: (tmp_path/'runs'/kind).mkdir(); bad_json(tmp_path/'runs'/kind/'run.json', kind)
    rc,out,err = bounded(slm('runs'), tmp_path, memory=2*GB, cpu=20)
    assert rc == 0, err
    state = {l.split()[0]: l.split()[2] for l in out.splitlines()}
    assert state == {f'runs/{k}': 'damaged' for k in BAD} | {'runs/good': 'interrupted'}

@pytest.mark.parametrize('kind', BAD)
def test_a_bad_state_of_a_checkpoint_is_one_line(kind, tmp_path):
    at = run_folder(tmp_path/'run')/'checkpoints'/'00000001'/'state.json'; at.unlink(); bad_json(at, kind)
    code = "from slm.core import *\nfrom slm.train.learner import read_state\ntry: read_state({at!r})\nexcept SLMError as e: print(e)"
    rc,out,err = bounded(code.format(at=str(at.parent)), tmp_path, memory=16*GB, cpu=60)
    assert rc == 0 and out.count('\n') == 1 and 'state.json' in out, (out, err[-2000:])

def test_options_of_a_run_are_checked_before_they_are_used(tmp_path):
    good = dict(corpus='pydocs', steps=5)
    for i,(bad,why) in enumerate(((dict(steps='many'), '--steps'), (dict(schedule='zigzag'), '--schedule'), (dict(lr=-1), '--lr'),
                                  (dict(depth=3), "no option 'depth'"), (dict(seed=-1), '--seed'), (dict(model=[]), '--model'))):
        run_folder(tmp_path/str(i), config=good | bad); (tmp_path/str(i)/'tokenizer.json').write_text('{}')
    code = '''
        from slm.core import SLMError
        from slm.train.pretrain import resume
        for i in range(6):
            try: resume(str(i))
            except SLMError as e: print(e)'''
    rc,out,err = bounded(code, tmp_path, memory=16*GB)
    whys = ('--steps', '--schedule', '--lr', "no option 'depth'", '--seed', '--model')
    assert rc == 0 and all(w in l for w,l in zip(whys, out.splitlines(), strict=True)), (out, err[-2000:])

KILL = '''
    import os, sys
    from pathlib import Path
    from slm import core
    if not {exchange}: core._exchange = lambda a, b: False
    def write(n): # by a process that is killed at the line `n` of what it does
        pid = os.fork()
        if pid: return os.waitpid(pid, 0)[1]
        def trace(frame, event, arg):
            nonlocal n
            if frame.f_code.co_name not in ('atomic_dir', '_exchange', 'rmtree', '_rmtree_safe_fd'): return
            n -= event == 'line'
            if n < 0: os.kill(os.getpid(), 9)
            return trace
        sys.settrace(trace)
        with core.atomic_dir('d') as d: (d/'a').write_text('new'); (d/'b').write_text('new')
        os._exit(0)
    old,new = dict(a='old', b='old'),dict(a='new', b='new'); seen = []
    while True:
        Path('d').mkdir(exist_ok=True); [Path('d', k).write_text(v) for k,v in old.items()]
        killed = write(len(seen)); core.recover('.')
        seen.append({{p.name: p.read_text() for p in Path('d').iterdir()}})
        assert seen[-1] in (old, new), (len(seen), seen[-1])
        if not killed: break
    assert seen[0] == old and seen[-1] == new
    print(len(seen))
'''

@pytest.mark.parametrize('exchange', [True, False])
def test_a_folder_is_whole_wherever_its_writer_is_killed(exchange, tmp_path):
    rc,out,err = bounded(KILL.format(exchange=exchange), tmp_path)
    assert rc == 0 and int(out) > 20, (out, err[-2000:])

def test_a_run_that_was_moved_aside_is_opened(tmp_path):
    from slm.core import RunDir
    run_folder(tmp_path/'.run.0a_b1c2d.old')
    assert RunDir.open(tmp_path/'run').info['stage'] == 'pretrain'
    assert not (tmp_path/'.run.0a_b1c2d.old').exists()

@settings(max_examples=40, deadline=None)
@given(st.sampled_from(['model.safetensors', 'tokenizer.json', 'adapter_model.safetensors']), st.integers(0, 399), st.integers(0, 7))
def test_a_flipped_bit_is_noticed(name, at, bit):
    from slm.core import SLMError, RunDir, check_hashes
    with tempfile.TemporaryDirectory() as d:
        run = RunDir.create(Path(d)/'run', 'sft'); (run/name).write_bytes(bytes(range(200))*2); run.finish()
        check_hashes(run.path)
        b = bytearray((run/name).read_bytes()); b[at] ^= 1<<bit; (run/name).write_bytes(b)
        with pytest.raises(SLMError, match=re.escape(name)): check_hashes(run.path)

def test_hashes_name_no_file_elsewhere(tmp_path):
    from slm.core import check_hashes
    (tmp_path/'run.json').write_text(json.dumps(dict(hashes={'../../dev/zero': 'x', '/dev/zero': 'x'}))); check_hashes(tmp_path)
    for odd in ('[]', '{"hashes": 3}', '{}'): (tmp_path/'run.json').write_text(odd); check_hashes(tmp_path)

JSON = st.recursive(st.none() | st.booleans() | st.integers(-2**70, 2**70) | st.floats() | st.text(max_size=8),
                    lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=6), x, max_size=3), max_leaves=8)
FIGURE = st.fixed_dictionaries(dict(value=JSON), optional=dict(lo=JSON, hi=JSON, n=JSON, unit=JSON))
INFO = st.fixed_dictionaries(dict(schema=st.just(1) | JSON, stage=st.just('sft') | JSON, status=st.just('done') | JSON,
                                  config=st.just({}) | JSON,
                                  metrics=JSON | st.dictionaries(st.text(max_size=4), FIGURE | JSON, max_size=2)),
                             optional=dict(data=JSON, started=JSON, command=JSON, hardware=JSON, seed=JSON, prompts=JSON, hashes=JSON))

@settings(max_examples=60, deadline=None)
@given(INFO | JSON)
def test_whatever_a_run_json_holds_it_is_listed(info):
    from slm.core import RunDir, SLMError, check_hashes
    from slm.train.pretrain import write_report
    from typer.testing import CliRunner
    from slm.cli import app
    with tempfile.TemporaryDirectory() as d:
        (Path(d)/'run').mkdir(); (Path(d)/'run'/'run.json').write_text(json.dumps(info)); check_hashes(Path(d)/'run')
        r = CliRunner().invoke(app, ['runs', d]); assert r.exit_code == 0 and r.exception is None, r.exception
        try: write_report(RunDir.open(Path(d)/'run'))
        except SLMError: assert 'damaged' in r.output or info['schema'] > 1
        r = CliRunner().invoke(app, ['resume', str(Path(d)/'run')]); assert isinstance(r.exception, SLMError), r.exception

STATE = st.fixed_dictionaries({},
                              optional=dict(step=JSON, tokens=JSON, loader=JSON, rng=JSON, optim=JSON, sources=JSON, seconds=JSON,
                                            hashes=JSON))

@settings(max_examples=50, deadline=None)
@given(STATE | JSON)
def test_whatever_a_state_json_holds_it_is_one_line(state):
    import torch
    from safetensors.torch import save_file
    from slm.core import SLMError
    from slm.data.loaders import LMDataLoader
    from slm.train.learner import LMLearner
    from fastai.data.core import DataLoaders
    data,net = SimpleNamespace(n_tokens=64),torch.nn.Linear(2, 2); dl = LMDataLoader(data, 2, 4, 0, 'cpu')
    whole = dict(step=1, tokens=1, loader=dl.state_dict(), rng={}, optim=dict(state={}, param_groups=[]))
    with tempfile.TemporaryDirectory() as d:
        save_file(net.state_dict(), Path(d)/'model.safetensors'); save_file({}, Path(d)/'optim.safetensors')
        (Path(d)/'state.json').write_text(json.dumps(whole | state if isinstance(state, dict) else state))
        with pytest.raises(SLMError): LMLearner(DataLoaders(dl, dl), net).load_checkpoint(d)

# ---- models and tokenizers

FOLDER = """
import json, os, sys
from pathlib import Path
from slm.core import SLMError
from slm.data.tokenizer import Tokenizer, check_gguf, train_bpe
from slm.model.gpt import GPT, GPTConfig
import slm.model.pretrained
def refuse(f, *a):
    try: f(*a)
    except SLMError as e: assert '\\n' not in str(e) and len(str(e)) < 600, e
    else:
        raise AssertionError(f'accepted: {a}, {(a[0]/"config.json").read_text()[:900] if isinstance(a[0], Path) and a[0].is_dir() else 0}')
tok = train_bpe(['the cat sat on the mat and the dog too']*5, 270)
GPT(GPTConfig(vocab_size=270, n_layer=1, d_model=64, max_seq_len=64)).save_pretrained('m', tok)
m, config = Path('m'), json.loads(Path('m/config.json').read_text())
"""

def holds(code, cwd, **kw):
    rc, out, err = bounded(FOLDER+textwrap.dedent(code), cwd, **kw)
    assert rc == 0, err[-2000:]

def test_nonsense_in_a_configuration_is_one_line(tmp_path):
    holds("""
        for k,vs in dict(num_hidden_layers=[10**9, -1, 'x', 1.5, None], head_dim=[10**9], hidden_size=[10**9, 0],
                         num_attention_heads=[0, 10**9], rms_norm_eps=['x', -1, float('nan')],
                         vocab_size=[10**12, 0], intermediate_size=[10**15],
                         rope_parameters=[[1], dict(rope_type='yarn', factor=float('nan')), dict(rope_type='linear', factor=0),
                                          dict(rope_theta='x'), dict(rope_theta=float('nan')), dict(rope_theta=-5.)],
                         num_key_value_heads=[10**9], max_position_embeddings=[0, 'x', 10**20]).items():
            for v in vs: (m/'config.json').write_text(json.dumps(config | {k: v})); refuse(GPT.from_pretrained, m)
        for s in ('['*10**6, '{"a": '+'9'*5000+'}', '[]', 'null', '{'): (m/'config.json').write_text(s); refuse(GPT.from_pretrained, m)
        with open(m/'config.json', 'wb') as f: f.truncate(2**30)
        refuse(GPT.from_pretrained, m); (m/'config.json').unlink(); os.mkfifo(m/'config.json'); refuse(GPT.from_pretrained, m)
    """, tmp_path)

def test_a_large_model_is_not_built_for_small_files(tmp_path):
    "16 GB of weights are asked for where the process may have 4"
    holds("(m/'config.json').write_text(json.dumps(config | dict(num_hidden_layers=999, hidden_size=4096, "
          "head_dim=4096, intermediate_size=9999)))\nrefuse(GPT.from_pretrained, m)", tmp_path)

def test_an_index_of_shards_stays_in_its_folder(tmp_path):
    holds("""
        (m/'model.safetensors').rename('outside.safetensors')
        for w in ([], None, 3, dict(a='../outside.safetensors'), dict(a=str(Path('outside.safetensors').resolve())),
                  dict(a=5), dict(a='../../etc/passwd')):
            (m/'model.safetensors.index.json').write_text(json.dumps(dict(weight_map=w))); refuse(GPT.from_pretrained, m)
    """, tmp_path)

def test_weights_that_lie_about_themselves_are_one_line(tmp_path):
    holds("""
        whole = (m/'model.safetensors').read_bytes(); n = int.from_bytes(whole[:8], 'little'); head = json.loads(whole[8:8+n])
        def write(h, size=None):
            raw = json.dumps(h).encode() if isinstance(h, dict) else h
            (m/'model.safetensors').write_bytes((size or len(raw)).to_bytes(8, 'little')+raw+whole[8+n:])
        k = 'model.norm.weight'
        for change in (dict(shape=[10**9]), dict(shape=[2**62, 2**62]), dict(data_offsets=[0, 2**60]), dict(dtype='X9'),
                       dict(shape=[-1]), dict(shape='x')):
            write(head | {k: head[k] | change}); refuse(GPT.from_pretrained, m)
        for raw,size in ((b'{}', 2**63), (b'['*1000, None), (b'null', None), (b'', 1)): write(raw, size); refuse(GPT.from_pretrained, m)
        (m/'model.safetensors').unlink(); os.mkfifo(m/'model.safetensors'); refuse(GPT.from_pretrained, m)
    """, tmp_path)

def test_a_tokenizer_out_of_order_is_one_line(tmp_path):
    holds("""
        d = json.loads((m/'tokenizer.json').read_text())
        def write(**model): (m/'tokenizer.json').write_text(json.dumps(d | dict(model=d['model'] | model))); refuse(Tokenizer.load, m)
        v = d['model']['vocab']
        write(vocab=v | {'a': v['b']}); write(vocab=v | {'zz': 4*10**9}); write(vocab=[]); write(merges=[['q']]); write(type='x')
        (m/'tokenizer.json').write_text('['*10**6); refuse(Tokenizer.load, m)
        (m/'tokenizer.json').unlink(); os.mkfifo(m/'tokenizer.json'); refuse(Tokenizer.load, m)
    """, tmp_path)

TEMPLATES = ["{% for i in range(10**9) %}x{% endfor %}", "{{ 'a'*10**9 }}", "{{ 'a'*10**5*10**5 }}", "{{ [1]*10**9 }}", "{{ 9**9**9**9 }}",
             "{{ (1).to_bytes(10**9) }}",
    "{% for i in range(99999) %}{% for j in range(99999) %}x{% endfor %}{% endfor %}",
    "{% for i in range(9) recursive %}{{ loop(range(9)) }}{% endfor %}",
    "{% set n=namespace(s='aaaaaaaaaa') %}{% for i in range(60) %}{% set n.s=n.s~n.s %}{% endfor %}{{n.s}}", "{{ 'a'.center(10**9) }}",
    "{{ 'a'|center(10**9) }}",
    "{% set n=namespace(l=[1]) %}{% for i in range(60) %}{% set n.l=[n.l,n.l] %}{% endfor %}{{n.l}}", "{{ '%1000000000d' % 1 }}",
    "{{ '{:1000000000}'.format(1) }}",
    "{% macro f(n) %}{{ f(n-1) }}{{ f(n-1) }}{% endmacro %}{{ f(900) }}", "{{ messages|tojson(indent=10**9) }}",
    "{{ ('a'*99999).replace('a', 'b'*99999) }}",
    "{{ (['a'*99999]*9999)|join }}", "{{ messages|batch(10**9, 0)|list }}", "{{ lipsum(10**6) }}", "{{ 1/0 }}", "{{ 'x'+1 }}",
    "{{ messages[0].a.b }}", "{% include 'x' %}",
    "{{" + "("*9999 + "1" + ")"*9999 + "}}", "{{ x.y", "{{ messages[0].__class__ }}{{ messages.append(1) }}"]

def test_a_chat_template_can_waste_neither_time_nor_memory(tmp_path):
    holds(f"""
        for t in {TEMPLATES!r}: refuse(Tokenizer(tok.tok, t).render_chat, [dict(role='user', content='hi')])
        hwm = Path('/proc/self/status') # ru_maxrss would count what the parent had before its fork
        if hwm.exists(): assert int(hwm.read_text().split('VmHWM:')[1].split()[0]) < 2**20 # kB
    """, tmp_path)

def test_a_gguf_header_is_not_believed(tmp_path):
    "Each count and length, made enormous, before llama.cpp or the package gguf sees it"
    pytest.importorskip('gguf')
    holds("""
        import struct
        from slm.serve.export import export_gguf
        from slm.model.pretrained import open_gguf
        export_gguf(GPT.from_pretrained(m), tok, 'm.gguf', 'f16')
        whole = Path('m.gguf').read_bytes(); check_gguf('m.gguf')
        f = Path('bad.gguf')
        def broken(at, fmt, v):
            b = bytearray(whole); struct.pack_into(fmt, b, at, v); f.write_bytes(b)
            for g in (check_gguf, open_gguf, Tokenizer.from_gguf): refuse(g, f)
        for at in (8, 16, 24): # tensors, keys, length of the first key
            for v in (2**40, 2**63, 2**64-1): broken(at, '<Q', v)
        broken(4, '<I', 99); broken(0, '<I', 0)
        for key in (b'tokenizer.ggml.tokens', b'tokenizer.ggml.merges'): # count of an array, behind its type
            for v in (2**32, 2**63): broken(whole.index(key)+len(key)+8, '<Q', v)
        for key in (b'llama.block_count', b'llama.attention.head_count', b'llama.embedding_length'):
            for v in (0, 2**31): broken(whole.index(key)+len(key)+4, '<I', v)
        for n in (0, 10, 30, len(whole)//2, len(whole)-40): f.write_bytes(whole[:n]); refuse(check_gguf, f)
    """, tmp_path)

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

def test_parquet_whose_footer_contradicts_itself(tmp_path): # pyarrow aborts at many of these bits
    import pyarrow as pa, pyarrow.parquet as pq
    pq.write_table(pa.table(dict(text=['one', 'two'], tags=[['a'], ['b', 'c']])), tmp_path/'a.parquet')
    raw = (tmp_path/'a.parquet').read_bytes()
    footer = len(raw)-8-int.from_bytes(raw[-8:-4], 'little')
    said = []
    for at,bit in ((18, 4), (19, 1), (20, 1), (34, 1), (63, 4), (92, 1), (106, 1), (167, 1), (194, 1)):
        flipped = bytearray(raw)
        flipped[footer+at] ^= bit
        (tmp_path/'b.parquet').write_bytes(flipped)
        said += reads('b.parquet', tmp_path)
    assert all(line.startswith(("slm: 'b.parquet' is not a readable", 'row ')) for line in said)
    assert any('its footer contradicts itself' in line for line in said)

def test_parquet_that_unpacks_to_a_gigabyte(tmp_path):
    import pyarrow as pa, pyarrow.parquet as pq
    text = pa.chunked_array([pa.array(['x'*(64<<20)])]*18)
    pq.write_table(pa.table(dict(text=text)), tmp_path/'a.parquet', compression='zstd', use_dictionary=False, write_statistics=False)
    (line,) = reads('a.parquet', tmp_path)
    assert "'a.parquet' unpacks" in line and 'smaller ones' in line

@pytest.mark.parametrize('bad',
                         ['['*100_000, '{"a": '*100_000, '{"a": %s}' % ('9'*100_000), '{"a": 1e999999}', '{"a": "\\ud83d"}', '\\ufeff'*99,
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
    return {'a.jsonl': lines, 'a.json': json.dumps(ROWS, indent=1).encode(), 'a.jsonl.gz': gzip.compress(lines, mtime=0),
            'a.csv': b'id,text\n1,"a\nb"\n2,c\n',
            'a.parquet': f.getvalue(), 'b.jsonl': lines.decode().encode('utf-16')}

SPELLINGS = spellings()
EDIT = st.tuples(st.integers(0, 10**6), st.integers(0, 4),
                 st.one_of(st.binary(max_size=6), st.sampled_from([b'[', b']', b'{', b'"', b'\\ud83d', b'\xef\xbb\xbf', b'\0', b'\n'])))

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

def test_schemas_that_ask_for_too_much_are_refused_before_they_grow(tmp_path):
    "Each was gigabytes, or free text with status 200, before"
    rc, out, err = bounded('''
        import json
        from slm.serve.engine import *
        def deep(n): return dict(items=deep(n-1)) if n else {}
        bad = dict(minItems=dict(minItems=10**9), maxItems=dict(maxItems=1e9), minLength=dict(minLength=10**9),
                   maxProperties=dict(maxProperties=10**12), deeper=deep(150), pattern=dict(type='string', pattern='^a{0,1000000}$'),
                   patternProperties={'patternProperties': {'b{999999}': {}}}, add=dict(anyOf=[dict(maxItems=9000)]*300),
                   lexer=dict(type='string', pattern='^(a{1000}){1000}$'), text={'$ref': '#'},
                   large=dict(allOf=[dict(anyOf=[dict(properties={f'p{i}_{j}': dict(const=j)}) for j in range(8)]) for i in range(8)]))
        for word,s in bad.items():
            try: bounded_schema(s); prove(json.dumps(s))
            except RequestError as e: assert word in str(e) and len(str(e)) < 500, (word, str(e))
            else: raise SystemExit(f'{word} passed')
        print('done')''', tmp_path, memory=2*GB)
    assert (rc, out) == (0, 'done\n'), err

def test_an_engine_survives_a_billion_items(tmp_path):
    rc, out, err = bounded('''
        import os, torch
        from slm.data.tokenizer import train_bpe
        from slm.model.gpt import GPT, GPTConfig
        from slm.serve.export import export_gguf
        from slm.serve.engine import *
        tok = train_bpe(['a kite and a lamp']*50, 270)
        export_gguf(GPT(GPTConfig(vocab_size=tok.vocab_size, n_layer=1, n_head=2, d_model=32, max_seq_len=128)).eval(),
                    tok, 'm.gguf', 'f32')
        e = GGUFEngine('m.gguf', slots=1, threads=1)
        for k in ('minItems', 'maxItems'):
            try: answer_all(e, [Request([5], 5, schema={'type': 'array', k: 10**9})])
            except RequestError as x: print(k in str(x))
        print(answer_all(e, [Request([5], 5)])[0][1].prompt_tokens, flush=True); e.close()''', tmp_path, memory=8*GB)
    assert (rc, out) == (0, 'True\nTrue\n1\n'), err

def test_bodies_that_some_reader_would_stumble_over(tmp_path):
    "A megabyte of anything is looked through in no time"
    rc, out, err = bounded('''
        from slm.serve.gate import APIError, check_json
        half, most = chr(92)+'ud83d', 10**6
        for body in (b'['*most, b'['*500+b']'*500, ('"'+half+'"').encode(), bytes([34, 0xed, 0xa0, 0xbd, 34]), b'{"a":'*most):
            try: check_json(body)
            except APIError as e: assert e.status == 400
            else: raise SystemExit(body[:20])
        for body in (b'"'+b'['*most+b'"', (chr(92)+'"').encode()*most, b'"'+(chr(92)+'"').encode()*most+chr(92).encode(),
                     b'{'*3, ('"'+half+chr(92)+'ude00"').encode(), ('"'+chr(92)+half+'"').encode()):
            check_json(body)
        print('done')''', tmp_path, cpu=20)
    assert (rc, out) == (0, 'done\n'), err

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
    functions="card(functions=[dict(name='sh', function='os.system')])", content="card(content='os.system')",
    backend="card(backend='os.system')",
    scoring="card(scoring=dict(method='os.system', terms=True))", expressions="card(expressions=[dict(name='x', expression='sh(1)')])",
    view="sql('ALTER TABLE sections RENAME TO s0', 'CREATE VIEW sections AS SELECT * FROM s0 WHERE randomblob(3000000000) IS NOT NULL')",
    trigger="sql('CREATE TRIGGER t AFTER DELETE ON sections BEGIN DELETE FROM documents; END')",
    wal="sql('PRAGMA journal_mode=WAL')", table="sql('CREATE TABLE more(a)', file='scoring.terms')",
    pickle="(d/'scoring').write_bytes(b'cos\\nsystem\\n(S\\'touch pwned\\'\\ntR.'); rehash(); os.environ['ALLOW_PICKLE'] = 'True'",
    config="(d/'config').write_bytes(b'cos\\nsystem\\n(S\\'touch pwned\\'\\ntR.')",
    link="(d/'scoring').unlink(); (d/'scoring').symlink_to('/dev/zero')",
    fifo="(d/'documents').unlink(); os.mkfifo(d/'documents')",
    flipped="b = bytearray((d/'documents').read_bytes()); b[-1] ^= 1; (d/'documents').write_bytes(b)",
    vectors="(d/'embeddings').write_bytes(b'IxMp'+b'\\xff'*400); card(embeddings='x', probe=[1.]); rehash()",
    deep="(d/'config.json').write_text('['*10**5)")

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
           "select hex(zeroblob(1000000000)) from txtai where similar('lamp')",
           "select id from txtai where id in (select id from sections)",
           "select sql from txtai union select sql from sqlite_master", "select id from txtai where similar('a') limit 99999999",
           "select id from txtai where similar('lamp') order by randomblob(3000000000)", "select load_extension('x') from txtai",
           "select * from txtai"]

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
for q in ('select randomblob(9) x from txtai', 'select id from txtai where similar(:v0) and id in (select a.id from sections a, sections '
          'b, sections c, sections d, sections e, sections f, sections g, sections h, sections i, sections j where a.text > j.text)'):
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
json_ = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
                     lambda s: st.lists(s) | st.dictionaries(st.text(), s), max_leaves=5)
names = st.sampled_from(['documents', 'scoring', 'scoring.terms', 'config.json'])
change = st.tuples(names, st.integers(0, 2**14), st.binary(min_size=1, max_size=8), st.booleans())
keys = st.sampled_from(['format', 'offset', 'dimensions', 'embeddings', 'probe', 'sources', 'files', 'language', 'functions'])
@settings(max_examples=int(os.environ.get('SLM_FUZZ', 40)), deadline=None, derandomize=True, database=None,
          suppress_health_check=list(HealthCheck))
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

# ---- what fuzzing found (tests/fuzz.py looks for more)

def test_an_error_is_one_short_line_whatever_it_quotes():
    from slm.core import SLMError
    assert str(SLMError('no column a\r\nb\x1b]0;title\x07\u2028\u202e: choose another')) == 'no column a  b ]0;title   : choose another'
    assert len(long := str(SLMError(f"no column '{'x'*10**6}': choose another"))) < 1500 and long.endswith("x': choose another")

def test_a_damaged_card_of_a_corpus_is_one_line(tmp_path):
    from slm.core import SLMError
    from slm.data.corpus import Corpus, build_corpus
    (tmp_path/'a.txt').write_text('A story of a lamp.\n\n'*200+'And one of a kite.\n\n'*200)
    c = build_corpus(f'files:{tmp_path}/a.txt', tmp_path/'c'); card = tmp_path/'c'/'corpus.json'; info = json.loads(card.read_text())
    elsewhere = [dict(info['files']['train'][0], name='../c/train-00000.parquet')]
    for change in ([], 3, None, dict(schema='x'), dict(files=[]), dict(files=dict(train=3)), dict(files=dict(train=[dict(name='x'*300)])),
                   dict(files=dict(train=elsewhere)), dict(statistics=dict(documents=3)), dict(statistics=None), dict(options={}),
                   dict(statistics=info['statistics'] | dict(bytes=dict(train=10**400, valid=1))), dict(revision=[1]), dict(left_out=[])):
        card.write_text(json.dumps(info | change if isinstance(change, dict) else change))
        try: repr(c := Corpus.open(c.path)), c.card()
        except SLMError as e: assert 'is damaged' in str(e) and 'build the corpus again' in str(e)
        else: assert change == dict(revision=[1])

@pytest.mark.parametrize('kind', ['bytes', 'numbers'])
def test_a_shard_that_was_exchanged_is_one_line(kind, tmp_path):
    import pyarrow as pa, pyarrow.parquet as pq
    from slm.core import SLMError
    from slm.data.corpus import Corpus, build_corpus
    (tmp_path/'a.txt').write_text('A story of a lamp.\n\n'*200+'And one of a kite.\n\n'*200)
    c = build_corpus(f'files:{tmp_path}/a.txt', tmp_path/'c'); shard = c.files('train')[0]
    if kind == 'bytes': shard.write_bytes(b'PAR1'+shard.read_bytes()[4:-12]+b'\xff'*8+b'PAR1')
    else: pq.write_table(pa.table(dict(text=[1, 2])), shard)
    with pytest.raises(SLMError, match='train-00000.parquet'): list(c.docs('train'))

def test_switches_of_our_own_configuration_that_are_none(tmp_path):
    holds("""
        GPT(GPTConfig(vocab_size=270, n_layer=1, d_model=64, max_seq_len=64, norm_pos='post')).save_pretrained('p'); p = Path('p')
        config = json.loads((p/'config.json').read_text()); assert config['model_type'] == 'slm'
        for k in ('bias', 'qk_norm', 'causal', 'tied', 'n_types', 'dropout'):
            for v in ('slm', None, -1, [], {}):
                (p/'config.json').write_text(json.dumps(config | dict(slm=config['slm'] | {k: v})))
                refuse(GPT.from_pretrained, p)
    """, tmp_path)

def test_half_a_character_in_the_settings_of_a_model_is_one_line(tmp_path):
    holds("""
        tok.save('t')
        for f in ('tokenizer_config.json', 'special_tokens_map.json', 'generation_config.json'):
            p = Path('t')/f; was = p.read_text() if p.exists() else '{}'
            p.write_text(json.dumps(json.loads(was) | dict(eos_token=chr(0xd83d)))); refuse(Tokenizer.load, Path('t')); p.write_text(was)
    """, tmp_path)

def test_types_of_tensors_at_which_llama_cpp_aborts(tmp_path):
    "A norm in half precision ended the process, and so the server, at the first token"
    pytest.importorskip('gguf')
    holds("""
        import struct
        from slm.serve.export import export_gguf
        export_gguf(GPT.from_pretrained(m), tok, 'm.gguf', 'f16'); whole = Path('m.gguf').read_bytes()
        for name,dims,kinds in ((b'output_norm.weight', 1, (1, 30, 28, 26)), (b'blk.0.ffn_up.weight', 2, (24, 26, 28))):
            for kind in kinds:
                b = bytearray(whole); struct.pack_into('<I', b, whole.index(name)+len(name)+4+8*dims, kind)
                Path('bad.gguf').write_bytes(b); refuse(check_gguf, Path('bad.gguf'))
    """, tmp_path)

def experts(count, used, **more): return dict(add_expert_count=count, add_expert_used_count=used, **more)
def heads(**more): return dict(add_embedding_length=32, add_head_count=2) | more
NAN, INF = float('nan'), float('inf')

@pytest.mark.parametrize('said', [dict(add_rope_scaling_type='x'), *(dict(add_rope_scaling_factor=x) for x in (NAN, 0., -1.)),
                                  *(dict(add_layer_norm_rms_eps=x) for x in (NAN, INF, -1.)), dict(add_expert_count=1), experts(0, 2),
                                  experts(2, 3), experts(4, 2, add_expert_group_used_count=9), experts(513, 2),
                                  *(heads(add_rope_dimension_count=n) for n in (256, 8, 15)), heads(add_value_length=8)])
def test_facts_at_which_llama_cpp_aborts(said, tmp_path):
    gguf = pytest.importorskip('gguf')
    from slm.core import SLMError
    from slm.data.tokenizer import check_gguf
    def write(arch='llama', **said):
        w = gguf.GGUFWriter(tmp_path/'m.gguf', arch)
        for k,v in said.items(): w.add_string('llama.rope.scaling.type', v) if k == 'add_rope_scaling_type' else getattr(w, k)(v)
        w.write_header_to_file(); w.write_kv_data_to_file(); w.write_tensors_to_file(); w.close(); return check_gguf(tmp_path/'m.gguf')
    with pytest.raises(SLMError, match='expert|rope|epsilon|heads'): write(**said)
    assert write(**heads(add_rope_dimension_count=16))['llama.rope.dimension_count'] == 16
    assert write('gptneox', **heads(add_rope_dimension_count=4)) and write('gpt2', add_embedding_length=30, add_head_count=2)  # odd heads
    assert write(**experts(8, 2), add_rope_scaling_type='yarn')['llama.expert_count'] == 8

def test_a_key_of_a_gguf_file_that_is_no_text_is_one_line(tmp_path):
    pytest.importorskip('xllamacpp', reason='needs: pip install xllamacpp')
    holds("""
        from slm.serve.api import gguf_embed
        from slm.serve.engine import GGUFEngine
        from slm.serve.export import export_gguf
        export_gguf(GPT.from_pretrained(m), tok, 'm.gguf', 'f16'); whole = Path('m.gguf').read_bytes()
        def opened(f):
            try: GGUFEngine(f, slots=1, threads=1).close()
            except SLMError: pass
        Path('k.gguf').write_bytes(whole.replace(b'general.name', b'gen\\x80ral.name')); opened('k.gguf')
        Path('n.gguf').write_bytes(whole.replace(b'tokenizer.ggml.tokens', b'tokenizer.ggml.tokenz')); refuse(gguf_embed, 'n.gguf')
    """, tmp_path, memory=8*GB)

def test_cells_of_a_notebook_with_odd_sources(tmp_path):
    pytest.importorskip('txtai', reason='needs: pip install txtai')
    from slm.serve.rag import Reading
    cells = [dict(cell_type='code', source=s) for s in (127, None, True, {'a': 1}, [1, 'x = 1'], 'y = 2')]
    (tmp_path/'a.ipynb').write_text(json.dumps(dict(cells=cells)))
    (d,) = Reading([tmp_path]); assert 'x = 1' in d.text and 'y = 2' in d.text

def test_a_few_seconds_of_fuzzing(tmp_path):
    "The same changes in each run; to look for others, by the minute: python tests/fuzz.py"
    import fuzz
    with fuzz.Reader(tmp_path) as r:
        for name in fuzz.READERS:
            needs = dict(gguf='gguf', llama='xllamacpp', documents='txtai', index='txtai').get(name, 'torch')
            pytest.importorskip(needs, reason=f'needs: pip install {needs}')
            for n in range(4 if name == 'index' else 12):
                why = r.ask(f'{name} 0 {n}')
                assert why in ('read', 'refused'), (name, n, why)
