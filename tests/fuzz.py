"""Damaged and hostile files for everything that opens files: each is read well, or refused in one line, within limits of time and memory.

    python tests/fuzz.py [--minutes 10] [--inputs N] [--only NAME …] [--seed 0] [--out fuzz-failures]
    python tests/fuzz.py --repeat fuzz-failures/NAME-1

Good files are changed: as bytes, and as the JSON, tables or numbers that they hold. A change that runs a line of `slm` that none ran before
is itself changed further. What is neither read nor refused (another exception, a crash, more than 20 seconds of a processor, 3 GB more of
memory) is kept in a folder, with the reason. The readers have a process of their own; it is started anew when it dies.
"""
import argparse, collections, faulthandler, gzip, io, itertools, json, math, os, random, re, resource, select, shutil, signal, subprocess
import sys, tempfile, time, traceback, zlib
from pathlib import Path

GB, CPU, WALL = 2**30, 20, 60 # bytes; seconds of a processor, and of the clock, for one input
READERS = {} # name -> what makes the good files, and what reads them

def reader(make): return lambda f: READERS.setdefault(f.__name__, (make, f)) and f

# ---- changes

NUMBERS = [0, -1, 1, 2, 3, 127, 255, 256, 2**15, 2**16, 2**31-1, 2**31, 2**32-1, 2**32, 2**40, 2**63-1, 2**63, 2**64-1]
VALUES = [None, True, False, *NUMBERS, -2**63, 10**20, 10**400, .5, -1.5, 1e-320, 1e308, math.inf, math.nan, '', 'x', '\ud83d', '\0',
          'a\nb', 'a\x1b[31m', '../x', '9'*400, 'x'*10_000, [], {}, [1], ['x'], [None], {'a': 1}, {'': None}, [[[[[]]]]]]
PIECES = [b'null', b'[', b']', b'{', b'}', b'"', b',', b':', b'\\', b'\n', b'\r', b'\0', b'\xff', b'\xef\xbb\xbf', b'\\ud83d', b'\\u0000',
          b'-1', b'1e999', b'NaN', b'9'*5000, b'['*2000, b'{"a":'*2000, b'x'*70_000, b'\xed\xa0\xbd', b'\xe2\x80\xa8', b'\x1b[2J', b'{{',
          b'%}', b'<|end|>', b'../']

def places(v):
    "Where a value can be changed"
    for k in v if isinstance(v, dict) else range(len(v)) if isinstance(v, list) else ():
        yield v, k
        yield from places(v[k])

def edit_json(v, rng):
    "One place of it changed"
    box = [v]; spots = [(box, 0), *itertools.islice(places(v), 20_000)]; o, k = rng.choice(spots); what = rng.randrange(7)
    if what == 0 and o is not box: del o[k]
    elif what == 1 and isinstance(o, dict): o[rng.choice(['x', '', 'text', 'content', *o])] = o.pop(k)
    elif what == 2:
        p, j = rng.choice(spots); o[k] = json.loads(json.dumps(p[j]))
    elif what == 3 and isinstance(o[k], (int, float)): o[k] = rng.choice([o[k]+1, o[k]-1, o[k]*2, -o[k], str(o[k]), float(o[k])])
    elif what == 4 and isinstance(o[k], list) and o[k]: o[k] = o[k]*2 if rng.random() < .5 else o[k][:-1]
    elif what == 5 and isinstance(o[k], str): o[k] = edit_bytes(o[k].encode('utf-8', 'surrogatepass'), rng).decode('utf-8', 'replace')
    else: o[k] = rng.choice(VALUES)
    return box[0]

def number(rng, size): return (rng.choice(NUMBERS) % 256**size).to_bytes(size, 'little')

def edit_bytes(b, rng):
    "Some bytes changed, put in, taken out or repeated"
    at, n, what = rng.randrange(len(b)+1), rng.choice([1, 1, 2, 4, 8, 64, 1000]), rng.randrange(7)
    if what == 0: return b[:at]+rng.randbytes(min(n, 8))+b[at+n:]
    if what == 1: return b[:at]+rng.choice(PIECES)+b[at+rng.choice([0, n]):]
    if what == 2: return b[:at]+number(rng, size := rng.choice([1, 2, 4, 8]))+b[at+size:]
    if what == 3: return b[:at]+b[at+n:]
    if what == 4: return b[:at]+b[at:at+n]*rng.choice([2, 2, 3, 100])+b[at+n:]
    if what == 5: return b[:at]
    return b[:at]+bytes([b[at] ^ 1 << rng.randrange(8)])+b[at+1:] if at < len(b) else b+b'\0'

ARCHITECTURES = b'llama qwen3 gemma qwen2 bloom mamba olmo2 rwkv6'.split()

def edit_gguf(b, rng):
    "A number behind one of the keys, or another architecture"
    if rng.random() < .05: return b.replace(rng.choice(ARCHITECTURES[:2]), rng.choice(ARCHITECTURES))
    keys = list(re.finditer(rb'[a-z0-9_]{1,40}(?:\.[a-z0-9_]{1,40}){1,4}', b[:len(b)//2]))
    if not keys: return edit_bytes(b, rng)
    m, size = rng.choice(keys), rng.choice([4, 4, 8]); at = m.end()+rng.choice([0, 4, 4, 8, 8, 12, 16, 20])
    if rng.random() < .2: at, size = m.start()-8, 8
    return b[:at]+number(rng, size)+b[at+size:]

def edit(name, b, rng):
    "One change of a file"
    if name.endswith('.gz') and rng.random() < .7:
        try: return gzip.compress(edit(name[:-3], gzip.decompress(b), rng), 1)
        except (OSError, EOFError, zlib.error): pass
    if name.endswith('.safetensors') and rng.random() < .7 and len(b) > 8:
        n = int.from_bytes(b[:8], 'little'); head = edit('x.json', b[8:8+n], rng)
        return len(head).to_bytes(8, 'little')+head+b[8+n:]
    if name.endswith('.gguf') and rng.random() < .6: return edit_gguf(b, rng)
    if name.endswith(('json', 'jsonl', 'ipynb')) and rng.random() < .75:
        lines = b.split(b'\n') if name.endswith('jsonl') else [b]; i = rng.randrange(len(lines))
        try: lines[i] = json.dumps(edit_json(json.loads(lines[i]), rng)).encode(); return b'\n'.join(lines)
        except (ValueError, RecursionError, OverflowError): pass
    return edit_bytes(b, rng)

def change(files, rng):
    "Some of the files changed, a few times"
    files = dict(files)
    for _ in range(rng.choice([1, 1, 1, 2, 3, 6])):
        name = rng.choice(sorted(files)); files[name] = edit(name, files[name], rng)
    return files

# ---- models and tokenizers

def taken(folder, but=()):
    "The files of a folder by their names, and the folder gone"
    res = {str(p.relative_to(folder)): p.read_bytes() for p in sorted(Path(folder).rglob('*')) if p.is_file() and p.name not in but}
    shutil.rmtree(folder); return res

CHAT = [dict(role='system', content='Be kind.'), dict(role='user', content='Where is it? <|end|>'),
        dict(role='assistant', content='There.'), dict(role='user', content='Ah.')]

def small_tokenizer():
    from slm.data.tokenizer import train_bpe
    return train_bpe(['the cat sat on the mat and the dog too']*5, 270)

def small_models():
    from slm.model.pretrained import GPT, GPTConfig
    yarn = dict(rope_type='yarn', factor=2., original_max_position_embeddings=16)
    gpt2 = dict(norm='layer', pos='learned', act='gelu_tanh', bias=True)
    for kw in (dict(), dict(qk_norm=True, n_kv_head=1), dict(rope_scaling=yarn), gpt2, dict(norm_pos='post')):
        yield GPT(GPTConfig(**dict(vocab_size=270, n_layer=1, d_model=32, n_head=2, max_seq_len=32) | kw))

def folders():
    for net in small_models(): net.save_pretrained('s', small_tokenizer()); yield taken('s', ['tokenizer.json'])

def answers(net):
    import torch
    ids = torch.tensor([[1, 2, 3]]) % net.cfg.vocab_size
    with torch.no_grad(): assert net(ids).shape == (1, 3, net.cfg.vocab_size)

@reader(folders)
def model(d):
    from slm.model.pretrained import GPT
    answers(GPT.from_pretrained(d))

def tokenizer_folders():
    from slm.data.tokenizer import PRE_TOKENIZERS, CHAT_TEMPLATE
    from tokenizers import AddedToken, processors
    for pre in (None, *PRE_TOKENIZERS):
        tok = small_tokenizer(); end = '<|end|>', tok.tok.token_to_id('<|end|>')
        if pre:
            tok.tok.pre_tokenizer = PRE_TOKENIZERS[pre]; tok.tok.add_tokens([AddedToken('<think>', special=False)])
            tok.tok.post_processor = processors.TemplateProcessing(single='<|end|> $A', special_tokens=[end])
        tok.save('s')
        Path('s/config.json').write_text(json.dumps(dict(vocab_size=272, eos_token_id=[1, 2], bos_token_id=0)))
        Path('s/special_tokens_map.json').write_text(json.dumps(dict(pad_token=dict(content='<pad>'))))
        if pre: Path('s/chat_template.jinja').write_text(CHAT_TEMPLATE)
        yield taken('s')

def speaks(tok):
    "What a tokenizer is asked for"
    from slm.core import SLMError
    tok.decode(tok.encode('The cat’s <|end|> 12345 \U0001f600\n\n sat'))
    tok.fingerprint, tok.id_bytes, tok.stop_ids, tok.names, tok.generation_config(), tok.pad_id, tok.bos_id
    for ask in (lambda: tok.chat(CHAT), lambda: tok.encode_bytes(b'the \xff cat'), lambda: tok.decode_bytes(range(tok.vocab_size))):
        try: ask()
        except SLMError as e: assert_one_line(e)

@reader(tokenizer_folders)
def tokenizer(d):
    from slm.data.tokenizer import Tokenizer
    speaks(Tokenizer.load(d))

def ggufs():
    from unittest.mock import patch
    import gguf
    from slm.serve.export import export_gguf
    plain = gguf.GGUFWriter.write_header_to_file
    def with_more(w, path): # keys that other programs write
        for k in ('expert_count', 'expert_used_count', 'pooling_type', 'leading_dense_block_count'): w.add_uint32(f'{w.arch}.{k}', 0)
        for k in ('unknown', 'seperator', 'mask', 'fim_pre', 'eom', 'cls'): w.add_uint32(f'tokenizer.ggml.{k}_token_id', 1)
        w.add_uint32(f'{w.arch}.attention.sliding_window', 32); w.add_bool(f'{w.arch}.attention.causal', True)
        w.add_float32(f'{w.arch}.attention.scale', 1.); w.add_array('tokenizer.ggml.scores', [0.]*270)
        w.add_bool('tokenizer.ggml.add_space_prefix', False); w.add_uint16('split.count', 1); w.add_uint32('general.alignment', 32)
        plain(w, path)
    for net in itertools.islice(small_models(), 3):
        for header,kind in ((plain, 'f16'), (with_more, 'q8_0')):
            Path('s').mkdir()
            with patch('gguf.GGUFWriter.write_header_to_file', header): export_gguf(net, small_tokenizer(), 's/m.gguf', kind)
            yield taken('s')

@reader(ggufs)
def gguf(d):
    from slm.data.tokenizer import Tokenizer
    from slm.model.pretrained import GPT
    speaks(Tokenizer.from_gguf(d/'m.gguf')); answers(GPT.from_pretrained(d/'m.gguf'))

@reader(ggufs)
def llama(d):
    from slm.serve.engine import GGUFEngine, Request, answer_all
    e = GGUFEngine(d/'m.gguf', slots=1, threads=1)
    try: answer_all(e, [Request([1, 2], 2)])
    finally: e.close()

# ---- templates of chats

LAST = """{% set ns = namespace(last=-1) %}{% for m in messages %}{% if m['role'] == 'user' %}{% set ns.last = loop.index0 %}{% endif %}
{% endfor %}{% for m in messages %}
{{ '<|' + m['role']|upper + '|>' + (m['content']|trim if loop.index0 < ns.last else m.content.split('a')[-1]) }}{% endfor %}"""

def templates():
    from slm.data.tokenizer import CHAT_TEMPLATE, TEXT_TEMPLATE
    for t in (CHAT_TEMPLATE, TEXT_TEMPLATE, LAST): yield dict(template=t.encode())

WORDS, NAMES = re.compile(r'\{[{%]-?|-?[}%]\}|\w+|\s+|.', re.S), re.compile(r'\.\{\}|\|\{\}')
METHODS = '''tojson join replace list length upper split format slice batch center wordwrap map select sort groupby sum indent string int
float random first last trim items keys values append pop __class__ __init__ cycler'''.split()
JINJA = METHODS+'''{{ }} {% %} for in endfor if endif set macro endmacro namespace range ( ) [ ] . | ~ * + ** % , = x messages message loop
loop.index 0 -1 9999999999 'a' "%s" caller call endcall filter endfilter recursive include import extends block endblock self is not defined
none true strftime_now raise_exception generation endgeneration attribute : tools bos_token content role break continue'''.split()
ATOMS = '''messages messages[0] messages[1]['content'] x 0 3 -1 99999 10**9 'a' '%s{}' none true [] {} [1,[2]] range(9) range(99999) n.s
loop loop.index bos_token tools namespace dict f raise_exception strftime_now'''.split()
SHAPES = '''({}+{}) ({}*{}) ({}~{}) ({}%{}) ({}**{}) ({}-{}) {}[{}] {}[{}:] {}.{} {}|{} {}|{}({}) {}.{}({}) {}({}) [{},{}] {{{}:{}}}
({}=={}) namespace(s={}) dict(a={}) {}|map(attribute='role') {}|join({}) {}|tojson {}|replace({},{}) {}.split({}) {}|length {}|list
{}|string {}|indent({}) {}|sort {}|groupby({}) {}|slice({}) {}|batch({}) {}.items() {}.strip() {}.format({}) {}|sum {}|select({})
{}|trim'''.split()+['({} if {} else {})', '({} in {})', '({} is defined)', '(not {})']
BLOCKS = ['{{{{ {} }}}}', '{{% set x = {} %}}', '{{% set n.s = {} %}}', '{{% set n = namespace(s={}) %}}',
          '{{% for i in {} %}}{}{{% endfor %}}', '{{% if {} %}}{}{{% else %}}{}{{% endif %}}', 
          '{{% macro f(a, b={}) %}}{}{{% endmacro %}}', '{{% call f({}) %}}{}{{% endcall %}}',
          '{{% filter upper %}}{}{}{{% endfilter %}}', '{{% generation %}}{}{}{{% endgeneration %}}', '{{% set x %}}{}{}{{% endset %}}',
          '{{% block c %}}{}{}{{% endblock %}}', '{{% include {} %}}', '{{% for k, v in {} recursive %}}{}{{{{ loop(v) }}}}{{% endfor %}}']

def expression(rng, depth=0):
    if depth > 3 or rng.random() < .3: return rng.choice(ATOMS)
    shape = NAMES.sub(lambda m: m[0][0]+rng.choice(METHODS), rng.choice(SHAPES))
    return shape.format(*[expression(rng, depth+1) for _ in range(3)])

def block(rng, depth=0):
    if depth > 2: return rng.choice(['', 'text', '{{ x }}', '{{ i }}'])
    return rng.choice(BLOCKS).format(expression(rng), *[block(rng, depth+1) for _ in range(2)])

def change_template(files, rng):
    "Blocks put between others, or words changed"
    words = WORDS.findall(files['template'].decode('utf-8', 'replace'))
    for _ in range(rng.choice([1, 1, 2, 4])):
        if rng.random() < .7:
            ends = [i+1 for i,w in enumerate(words) if w[-1:] == '}' and len(w) > 1]
            words.insert(rng.choice(ends or [0]), block(rng)); continue
        at, n = rng.randrange(len(words)+1), rng.choice([0, 0, 1, 1, 2, 9]); a, b = sorted(rng.randrange(len(words)+1) for _ in range(2))
        words[at:at+n] = rng.choice([rng.choices(JINJA, k=rng.choice([1, 1, 2, 4])), words[a:b][:40], words[at:at+n]*2, []])
    return dict(template=''.join(words[:20_000]).encode())

@reader(templates)
def template(d):
    from slm.data.tokenizer import Tokenizer
    t = Tokenizer(small_tokenizer().tok, (d/'template').read_text(errors='replace'))
    t.stop_ids; t.render_chat(CHAT, True); t.chat(CHAT)

# ---- runs, rows, corpora

def runs():
    from dataclasses import asdict
    from safetensors.torch import save_file
    from slm.core import RunDir
    from slm.train.pretrain import PretrainConfig
    net, c = next(small_models()), Path('s/runs/a/checkpoints/00000001')
    r = RunDir.create('s/runs/a', 'pretrain', asdict(PretrainConfig(steps=9)), seed=1, data=dict(name='x', fingerprint='f'))
    r.add_metrics(bpb=2.5); c.mkdir(parents=True)
    save_file(net.state_dict(), c/'model.safetensors'); save_file({}, c/'optim.safetensors')
    state = dict(step=1, tokens=1, loader=dict(epoch=0, pos=0), rng={}, optim={}, sources={}, seconds=1.)
    (c/'state.json').write_text(json.dumps(state)); net.save_pretrained('s/runs/a', small_tokenizer()); r.finish(); yield taken('s')

@reader(runs)
def run(d):
    from slm.core import RunDir, list_runs
    from slm.train.learner import checkpoints, read_state
    from slm.train.pretrain import PretrainConfig
    for r in list_runs(d/'runs'): str(r), r.info['status'], r.info.get('started')
    r = RunDir.open(d/'runs'/'a'); PretrainConfig.again(r.info['config'])
    for k in r.info['metrics']: str(r.metric(k))
    for c in checkpoints(r/'checkpoints'): read_state(c)

def tables():
    import pyarrow as pa, pyarrow.parquet as pq
    rows = [dict(text='one, "two"', n=[1, {'a': None}]), dict(text='猫 \U0001f600 é'), dict(text=None, n=[])]*3
    chats = [[dict(role='user', content='a')]]*len(rows); f = io.BytesIO()
    pq.write_table(pa.table(dict(text=[str(r['text']) for r in rows], m=chats)), f); lines = '\n'.join(map(json.dumps, rows)).encode()
    yield {'a.jsonl': lines}
    yield {'a.jsonl.gz': gzip.compress(lines)}
    yield {'a.json': json.dumps(rows, indent=1).encode()}
    yield {'a.csv': b'id,text\n1,"a\nb"\n2,c\n'}
    yield {'a.tsv': b'id\ttext\n1\ta\n'}
    yield {'a.parquet': f.getvalue()}
    yield {'a.txt': 'Ein Stück.\n\nUnd noch eins.\r\n'.encode()*99}

@reader(tables)
def rows(d):
    from slm.data.corpus import read_rows, text_rows
    (p,) = d.iterdir()
    for where,row in itertools.chain(read_rows(p), text_rows(p)[1]): assert isinstance(row, dict) or len(row.splitlines()) == 1, where

@reader(tables)
def corpus(d):
    from slm.data.corpus import build_corpus
    c = build_corpus(f'files:{d}/*', 'out', rebuild=True); c.card(); list(c.docs('train'))

def corpora():
    from slm.data.corpus import build_corpus
    Path('a.txt').write_text('A story of a lamp.\n\n'*200+'And one of a kite.\n\n'*200); build_corpus('files:a.txt', 's'); yield taken('s')

@reader(corpora)
def corpus_folder(d):
    from slm.data.corpus import Corpus
    c = Corpus.open(d); repr(c), c.card()
    for split in ('train', 'valid'): list(c.docs(split))

# ---- documents and indexes

DOC = b'# Lamps\n\nAn *old* lamp.\n\n## Kites\n\n```python\n# no heading\n```\n\nA red kite.\n'
HTML = b'<html><head><title>x</title></head><body><h1>Lamps</h1><p>An &eacute; old<table><tr><td>1</td></tr></table><!--c--></body></html>'
KINDS = ('<?xml version="1.0"?><Types xmlns="http://schemas.openxmlformats.org/package/2006/content-types"><Default Extension="xml" '
         'ContentType="application/vnd.openxmlformats-officedocument.wordprocessingml.document.main+xml"/></Types>')
WORD = ('<w:document xmlns:w="http://schemas.openxmlformats.org/wordprocessingml/2006/main"><w:body><w:p>'
        '<w:r><w:t>A lamp</w:t></w:r></w:p></w:body></w:document>')

def papers():
    import zipfile
    cells = [dict(cell_type='markdown', source=['# Lamps\n', 'old']), dict(cell_type='code', source='#| export\ndef f(): "A lamp."')]
    with zipfile.ZipFile(f := io.BytesIO(), 'w') as z: # not deflated, so that a change is one of the text
        z.writestr('[Content_Types].xml', KINDS); z.writestr('word/document.xml', WORD)
    yield {'a.docx': f.getvalue()}
    yield {'a.html': HTML}
    yield {'a.md': DOC}
    yield {'a.txt': DOC}
    yield {'a.py': b'"""A lamp."""\nclass A:\n    "Kites."\n    def f(self): "B"\n'}
    yield {'a.csv': b'id,text\n1,lamp\n'}
    yield {'a.ipynb': json.dumps(dict(cells=cells)).encode()}
    yield {'a.jsonl': b'{"id": 1, "title": "t", "text": "lamp"}\n{"id": 1, "text": "kite"}'}

@reader(papers)
def documents(d):
    from slm.serve.rag import Reading, chunks
    r = Reading([d], strict=False)
    for c,doc in ((c, doc) for doc in r for c in chunks(doc)): assert c.text == doc.text[c.start:c.end] and c.text.strip()
    for why in r.bad: assert len(why.splitlines()) == 1, why

def indexes():
    from slm.serve.rag import Document, Index
    ix = Index('s', writable=True, embeddings='none'); ix.upsert([Document(f'd{i}', f'An old lamp {i}.') for i in range(9)]); ix.close()
    yield taken('s')

@reader(indexes)
def index(d):
    import hashlib
    from slm.serve.rag import Index
    try: # the hashes are put right, or they would refuse every change
        card = json.loads((d/'config.json').read_text())
        card['files'] = {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in d.iterdir() if p.name != 'config.json'}
        (d/'config.json').write_text(json.dumps(card))
    except (ValueError, TypeError, RecursionError): pass
    ix = Index(d, embeddings='none')
    try: ix.search('old lamp'); ix.query("select id from txtai where similar('lamp')"); len(ix)
    finally: ix.close()

# ---- the process that reads

def assert_one_line(e):
    text = str(e); assert len(text) < 2000 and text.isprintable(), f'no line: {text[:500]!r}'

def watched(f, d, seen):
    "Run `f`; 'read', 'refused', or what is wrong; and whether it came to lines that none came to before"
    from slm.core import SLMError
    known, home = len(seen), str(Path(sys.modules['slm'].__file__).parent)
    def lines(frame, event, arg):
        if event == 'line': seen.add((frame.f_code, frame.f_lineno))
        return lines
    sys.settrace(lambda frame, event, arg: lines if frame.f_code.co_filename.startswith(home) else None)
    try:
        try: f(d); said = 'read'
        except SLMError as e: assert_one_line(e); said = 'refused'
    except (KeyboardInterrupt, SystemExit): raise
    except BaseException: said = traceback.format_exc() # a panic of Rust is no Exception
    finally: sys.settrace(None)
    return said, len(seen) > known

def limits():
    "For one input"
    signal.setitimer(signal.ITIMER_PROF, CPU)
    if (p := Path('/proc/self/statm')).exists():
        now = int(p.read_text().split()[0])*os.sysconf('SC_PAGE_SIZE')
        resource.setrlimit(resource.RLIMIT_AS, (now+3*GB, resource.RLIM_INFINITY))

def made(line, pools):
    "The files of an input: 'NAME SEED N', or 'NAME FOLDER'"
    name, *rest = line.split()
    if name not in pools: pools[name] = list(READERS[name][0]()) # also where it is not needed: what it imports has no limits then
    if len(rest) == 1:
        return {str(p.relative_to(rest[0])): p.read_bytes() for p in Path(rest[0]).rglob('*') if p.is_file() and p.name != 'why.txt'}
    rng = random.Random(line); return (change_template if name == 'template' else change)(rng.choice(pools[name]), rng)

def work():
    "Answer each line with what became of its input, which lies in the folder `input` meanwhile"
    out, err = os.fdopen(os.dup(1), 'w'), open('stderr', 'w'); os.dup2(err.fileno(), 1); os.dup2(err.fileno(), 2)
    faulthandler.enable(err); faulthandler.register(signal.SIGPROF, err, chain=True); resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    pools, seen, d = {}, collections.defaultdict(set), Path('input').absolute()
    for line in sys.stdin:
        name = line.split()[0]; err.truncate(0); files = made(line, pools); shutil.rmtree(d, ignore_errors=True)
        for f,b in files.items(): (d/f).parent.mkdir(parents=True, exist_ok=True); (d/f).write_bytes(b)
        limits(); said, new = watched(READERS[name][1], d, seen[name]); signal.setitimer(signal.ITIMER_PROF, 0)
        if new and sum(map(len, files.values())) < 1e6: pools.setdefault(name, []).append(files)
        out.write(json.dumps(said)+'\n'); out.flush()

class Reader:
    "The process, started when it is needed"
    def __init__(self, home): self.home, self.p = Path(home), None
    def __enter__(self): return self
    def __exit__(self, *e):
        if self.p: self.p.stdin.close(); self.p.wait(); self.p.stdout.close()
    def start(self):
        env = os.environ | dict(OMP_NUM_THREADS='1', TQDM_DISABLE='1', TOKENIZERS_PARALLELISM='false', HF_HUB_OFFLINE='1',
                                GGML_NO_BACKTRACE='1', SLM_HOME=str(self.home/'home'))
        me = Path(__file__).absolute(); env['PYTHONPATH'] = os.pathsep.join([str(me.parents[1]), *sys.path])
        self.p = subprocess.Popen([sys.executable, me, '--work'], cwd=self.home, env=env, text=True,
                                  stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    def ask(self, line):
        "What it says: 'read', 'refused', or why it is a failure"
        wall = WALL
        if not self.p or self.p.poll() is not None: self.start(); wall *= 10 # what it imports, and the good files, take their time
        self.p.stdin.write(line+'\n'); self.p.stdin.flush()
        late = not select.select([self.p.stdout], [], [], wall)[0]
        if late: self.p.kill()
        if said := self.p.stdout.readline(): return json.loads(said)
        how = f'it waits for more than {wall} s' if late else f'the process died: {self.p.wait()}'
        self.p.wait(); return (self.home/'stderr').read_text(errors='replace')[-20_000:].lstrip('\0')+'\n'+how

# ---- the search

def sign(why):
    "What failures of one kind have in common: the last line of `slm`, and the kind of error"
    at = re.findall(r'File "[^"]*/(slm/[\w/]+\.py)", line (\d+)', why); last = why.strip().split('\n')[-1]
    spot = (at[-1] if why.lstrip().startswith('Traceback') else at[0]) if at else ('?', '?')
    return f"{':'.join(spot)} {last if 'died' in last else last.partition(':')[0]}"

def keep(out, name, k, home, why):
    "Put a failing input aside"
    if not (home/'input').exists(): sys.exit(why) # it is this script that fails
    to = Path(out)/f'{name}-{k}'; shutil.rmtree(to, ignore_errors=True); shutil.copytree(home/'input', to)
    (to/'why.txt').write_text(f'python tests/fuzz.py --repeat {to}\n\n{why}\n', errors='replace')

def fuzz(name, minutes, inputs=None, seed=0, out='fuzz-failures'):
    "Try one reader; how often each thing happened, and the failures by kind"
    said, kinds, n, slowest, begin = collections.Counter(), {}, 0, 0., time.monotonic()
    with tempfile.TemporaryDirectory() as home, Reader(home) as r:
        while n < inputs if inputs else time.monotonic() < begin+60*minutes:
            t = time.monotonic(); why = r.ask(f'{name} {seed} {n}'); n += 1; said[why if why in ('read', 'refused') else 'failed'] += 1
            if n > 1: slowest = max(slowest, time.monotonic()-t)
            else: begin = time.monotonic() # the first waits for what is imported
            if why in ('read', 'refused'): continue
            if (k := sign(why)) not in kinds: keep(out, name, len(kinds)+1, Path(home), why)
            kinds[k] = kinds.get(k, 0)+1
    figures = f"{n:7,} inputs {said['read']:7,} read {said['refused']:7,} refused {said['failed']:5,} failed"
    print(f'{name:14} {figures} in {time.monotonic()-begin:5.0f} s, the slowest {slowest:.1f} s', flush=True)
    for i,(k,m) in enumerate(kinds.items(), 1): print(f'    {m:5,} times {k}: {out}/{name}-{i}', flush=True)
    return said, kinds

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--minutes', type=float, default=10, help='in all')
    p.add_argument('--inputs', type=int, help='so many for each reader, instead')
    p.add_argument('--only', nargs='+', choices=READERS, default=[*READERS])
    p.add_argument('--seed', type=int, default=0)
    p.add_argument('--out', default='fuzz-failures', help='folder for inputs that fail')
    p.add_argument('--repeat', help='a folder of one of these')
    p.add_argument('--work', action='store_true', help=argparse.SUPPRESS); o = p.parse_args()
    if o.work: return work()
    if o.repeat:
        with tempfile.TemporaryDirectory() as home, Reader(home) as r:
            return print(r.ask(f"{Path(o.repeat).name.rpartition('-')[0]} {Path(o.repeat).absolute()}"))
    sys.exit(any([fuzz(name, o.minutes/len(o.only), o.inputs, o.seed, o.out)[0]['failed'] for name in o.only]))

if __name__ == '__main__': main()
