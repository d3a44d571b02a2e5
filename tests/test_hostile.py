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

def test_schemas_that_ask_for_too_much_are_refused_before_they_grow(tmp_path):
    "Each was gigabytes, or free text with status 200, before"
    rc, out, err = bounded('''
        import json
        from slm.serve.engine import *
        def deep(n): return dict(items=deep(n-1)) if n else {}
        bad = dict(minItems=dict(minItems=10**9), maxItems=dict(maxItems=1e9), minLength=dict(minLength=10**9), maxProperties=dict(maxProperties=10**12), deeper=deep(150),
                   pattern=dict(type='string', pattern='^a{0,1000000}$'), patternProperties={'patternProperties': {'b{999999}': {}}}, add=dict(anyOf=[dict(maxItems=9000)]*300),
                   lexer=dict(type='string', pattern='^(a{1000}){1000}$'), text={'$ref': '#'}, large=dict(allOf=[dict(anyOf=[dict(properties={f'p{i}_{j}': dict(const=j)}) for j in range(8)]) for i in range(8)]))
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
        tok = train_bpe(['a kite and a lamp']*50, 270); export_gguf(GPT(GPTConfig(vocab_size=tok.vocab_size, n_layer=1, n_head=2, d_model=32, max_seq_len=128)).eval(), tok, 'm.gguf', 'f32')
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
        for body in (b'"'+b'['*most+b'"', (chr(92)+'"').encode()*most, b'"'+(chr(92)+'"').encode()*most+chr(92).encode(), b'{'*3, ('"'+half+chr(92)+'ude00"').encode(), ('"'+chr(92)+half+'"').encode()): check_json(body)
        print('done')''', tmp_path, cpu=20)
    assert (rc, out) == (0, 'done\n'), err

# ---- indexes
