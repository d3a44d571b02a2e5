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
    else: raise AssertionError(f'accepted: {a}, {(a[0]/"config.json").read_text()[:900] if isinstance(a[0], Path) and a[0].is_dir() else 0}')
tok = train_bpe(['the cat sat on the mat and the dog too']*5, 270)
GPT(GPTConfig(vocab_size=270, n_layer=1, d_model=64, max_seq_len=64)).save_pretrained('m', tok)
m, config = Path('m'), json.loads(Path('m/config.json').read_text())
"""

def holds(code, cwd, **kw):
    rc, out, err = bounded(FOLDER+textwrap.dedent(code), cwd, **kw)
    assert rc == 0, err[-2000:]

def test_nonsense_in_a_configuration_is_one_line(tmp_path):
    holds("""
        for k,vs in dict(num_hidden_layers=[10**9, -1, 'x', 1.5, None], head_dim=[10**9], hidden_size=[10**9, 0], num_attention_heads=[0, 10**9],
                         rms_norm_eps=['x', -1, float('nan')], vocab_size=[10**12, 0], intermediate_size=[10**15],
                         rope_parameters=[[1], dict(rope_type='yarn', factor=float('nan')), dict(rope_type='linear', factor=0), dict(rope_theta='x'), dict(rope_theta=float('nan')), dict(rope_theta=-5.)],
                         num_key_value_heads=[10**9], max_position_embeddings=[0, 'x', 10**20]).items():
            for v in vs: (m/'config.json').write_text(json.dumps(config | {k: v})); refuse(GPT.from_pretrained, m)
        for s in ('['*10**6, '{"a": '+'9'*5000+'}', '[]', 'null', '{'): (m/'config.json').write_text(s); refuse(GPT.from_pretrained, m)
        with open(m/'config.json', 'wb') as f: f.truncate(2**30)
        refuse(GPT.from_pretrained, m); (m/'config.json').unlink(); os.mkfifo(m/'config.json'); refuse(GPT.from_pretrained, m)
    """, tmp_path)

def test_a_large_model_is_not_built_for_small_files(tmp_path):
    "16 GB of weights are asked for where the process may have 4"
    holds("(m/'config.json').write_text(json.dumps(config | dict(num_hidden_layers=999, hidden_size=4096, head_dim=4096, intermediate_size=9999)))\nrefuse(GPT.from_pretrained, m)", tmp_path)

def test_an_index_of_shards_stays_in_its_folder(tmp_path):
    holds("""
        (m/'model.safetensors').rename('outside.safetensors')
        for w in ([], None, 3, dict(a='../outside.safetensors'), dict(a=str(Path('outside.safetensors').resolve())), dict(a=5), dict(a='../../etc/passwd')):
            (m/'model.safetensors.index.json').write_text(json.dumps(dict(weight_map=w))); refuse(GPT.from_pretrained, m)
    """, tmp_path)

def test_weights_that_lie_about_themselves_are_one_line(tmp_path):
    holds("""
        whole = (m/'model.safetensors').read_bytes(); n = int.from_bytes(whole[:8], 'little'); head = json.loads(whole[8:8+n])
        def write(h, size=None):
            raw = json.dumps(h).encode() if isinstance(h, dict) else h
            (m/'model.safetensors').write_bytes((size or len(raw)).to_bytes(8, 'little')+raw+whole[8+n:])
        k = 'model.norm.weight'
        for change in (dict(shape=[10**9]), dict(shape=[2**62, 2**62]), dict(data_offsets=[0, 2**60]), dict(dtype='X9'), dict(shape=[-1]), dict(shape='x')):
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

TEMPLATES = ["{% for i in range(10**9) %}x{% endfor %}", "{{ 'a'*10**9 }}", "{{ 'a'*10**5*10**5 }}", "{{ [1]*10**9 }}", "{{ 9**9**9**9 }}", "{{ (1).to_bytes(10**9) }}",
    "{% for i in range(99999) %}{% for j in range(99999) %}x{% endfor %}{% endfor %}", "{% for i in range(9) recursive %}{{ loop(range(9)) }}{% endfor %}",
    "{% set n=namespace(s='aaaaaaaaaa') %}{% for i in range(60) %}{% set n.s=n.s~n.s %}{% endfor %}{{n.s}}", "{{ 'a'.center(10**9) }}", "{{ 'a'|center(10**9) }}",
    "{% set n=namespace(l=[1]) %}{% for i in range(60) %}{% set n.l=[n.l,n.l] %}{% endfor %}{{n.l}}", "{{ '%1000000000d' % 1 }}", "{{ '{:1000000000}'.format(1) }}",
    "{% macro f(n) %}{{ f(n-1) }}{{ f(n-1) }}{% endmacro %}{{ f(900) }}", "{{ messages|tojson(indent=10**9) }}", "{{ ('a'*99999).replace('a', 'b'*99999) }}",
    "{{ (['a'*99999]*9999)|join }}", "{{ messages|batch(10**9, 0)|list }}", "{{ lipsum(10**6) }}", "{{ 1/0 }}", "{{ 'x'+1 }}", "{{ messages[0].a.b }}", "{% include 'x' %}",
    "{{" + "("*9999 + "1" + ")"*9999 + "}}", "{{ x.y", "{{ messages[0].__class__ }}{{ messages.append(1) }}"]

def test_a_chat_template_can_waste_neither_time_nor_memory(tmp_path):
    holds(f"""
        for t in {TEMPLATES!r}: refuse(Tokenizer(tok.tok, t).render_chat, [dict(role='user', content='hi')])
        import resource; assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < 2**20 # kB
    """, tmp_path)

def test_a_gguf_header_is_not_believed(tmp_path):
    "Each count and length, made enormous, before llama.cpp or the package gguf sees it"
    pytest.importorskip('gguf')
    holds("""
        import struct
        from slm.serve.export import export_gguf
        from slm.model.pretrained import open_gguf
        export_gguf(GPT.from_pretrained(m), tok, 'm.gguf', 'f16'); whole = Path('m.gguf').read_bytes(); check_gguf('m.gguf'); f = Path('bad.gguf')
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

# ---- requests

# ---- indexes
