"The export gate: what is written opens elsewhere, what is broken is refused, nothing is left half-written."
import json, math, os, re, shutil, struct, subprocess, sys
from dataclasses import replace
import numpy as np, pytest, tokenizers, torch
from gguf import GGUFReader
from slm.core import RunDir, SLMError
from slm.data.tokenizer import PRE_TOKENIZERS, Tokenizer, char_tokenizer, train_bpe
from slm.data.world import World
from slm.model.gpt import GPT, GPTConfig
from slm.core import model_name
from slm.model.pretrained import rope_to_gguf
from slm.model.generate import SamplingParams, complete
from slm.model.pretrained import load_model_and_tokenizer
from slm.serve import export as E
from slm.serve.export import *
from slm.train.sft import sft
from strangers import WORDS, bpe, stranger

pytest.importorskip('xllamacpp', reason="needs: pip install -e '.[serve]'")
YARN = dict(rope_type='yarn', factor=4., original_max_position_embeddings=16)
DYNAMIC = dict(rope_type='dynamic', factor=2., original_max_position_embeddings=64)
LLAMA3 = dict(rope_type='llama3', factor=8., low_freq_factor=1., high_freq_factor=4., original_max_position_embeddings=16)
TEXTS = [s.text for s in World().stories(1, 40)]
TOK = train_bpe(TEXTS, 400)
BASE = GPTConfig(vocab_size=400, n_layer=2, n_head=2, n_kv_head=1, d_model=64, d_ff=96, max_seq_len=128)

def shaken(**over):
    "Random values everywhere, norms and biases too"
    torch.manual_seed(0); m = GPT(replace(BASE, **over)).eval(); g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in m.parameters(): p.add_(.1*torch.randn(p.shape, generator=g))
    return m

def few(tok=TOK, t=64, n=150): return material(tok, t, 'world', n, 300)
def failed(checks): return [c.name for c in checks if not c.passed]
def says(f, *parts):
    with pytest.raises(SLMError) as e: f()
    assert '\n' not in str(e.value) and all(p in str(e.value) for p in parts), str(e.value)

@pytest.fixture(scope='module')
def run(tmp_path_factory):
    "A run directory with a parent"
    root = tmp_path_factory.mktemp('runs')
    for name,parent in (('base', None), ('chat', 'base')):
        r = RunDir.create(root/name, 'pretrain' if parent is None else 'sft', parent=parent,
                          data=dict(name='world', **({} if parent else dict(license='Apache-2.0'))))
        shaken().save_pretrained(r.path, TOK); r.add_metrics(valid_bpb=1.5); r.finish()
    return root/'chat'

# ---- every model that can be said

@pytest.mark.parametrize('over',
                         [{}, dict(qk_norm=True), dict(tied=False), dict(bias=True), dict(n_kv_head=2), dict(head_dim=64),
                          dict(rope_theta=5e5), dict(rope_scaling=LLAMA3),
    dict(rope_scaling=dict(rope_type='linear', factor=4.)), dict(rope_scaling=YARN), dict(rope_scaling=YARN, qk_norm=True),
    dict(rope_scaling=DYNAMIC), dict(norm_eps=1e-2), dict(vocab_size=416)], ids=lambda o: '-'.join(o) or 'plain')
def test_llama_cpp_computes_the_same(tmp_path, over):
    m = shaken(**over); export_gguf(m, TOK, tmp_path/'m.gguf', 'f32')
    assert failed(check_llama_cpp(m, TOK, tmp_path/'m.gguf', 'f32', few())) == []

@pytest.mark.parametrize('more',
                         [dict(attention_factor=1.5), dict(beta_fast=16), dict(truncate=False), dict(mscale=1., mscale_all_dim=.5)],
                         ids=lambda m: next(iter(m)))
def test_a_yarn_that_llama_cpp_cannot_be_told_is_refused(tmp_path, more):
    with pytest.raises(SLMError, match='settings besides: export it with --to hf'):
        export_gguf(shaken(rope_scaling=YARN | more), TOK, tmp_path/'m.gguf', 'f32')
    assert not (tmp_path/'m.gguf').exists()

@pytest.mark.parametrize('kind', KINDS)
def test_every_kind_opens_and_its_tensors_are_near(tmp_path, kind):
    m = shaken(d_ff=100); kinds = export_gguf(m, TOK, tmp_path/'m.gguf', kind)
    assert check_weights(m, tmp_path/'m.gguf', kind).passed
    assert ('F16' in kinds) == (kind[0] == 'q' or kind == 'f16') and len(LlamaCpp(tmp_path/'m.gguf').nats([0, 5, 9], 400)) == 2

REFERENCE = '''import ctypes as C, sys
from pathlib import Path
lib, source, target, ftype = Path(sys.argv[1]), *sys.argv[2:]
class Params(C.Structure):
    _fields_ = [(n, C.c_int) for n in ('nthread', 'ftype', 'output', 'embedding')]+[('switches', C.c_bool*8), ('pointers', C.c_void_p*8)]
ggml = C.CDLL(str(next(lib.parent.glob('libggml.*so*'))), C.RTLD_GLOBAL)
ggml.ggml_backend_load_all_from_path(str(lib.parent).encode())
llama = C.CDLL(str(lib)); llama.llama_model_quantize_default_params.restype = Params
p = llama.llama_model_quantize_default_params(); p.ftype, p.nthread = int(ftype), 1
llama.llama_model_quantize.argtypes = [C.c_char_p, C.c_char_p, C.POINTER(Params)]
sys.exit(llama.llama_model_quantize(source.encode(), target.encode(), C.byref(p)))
'''

@pytest.mark.slow
@pytest.mark.parametrize('kind', ['q8_0', 'q6_k', 'q5_k_m', 'q4_k_m'])
@pytest.mark.parametrize('over', [dict(d_model=512, d_ff=768, n_layer=17), dict(d_model=576, d_ff=768, n_layer=9, tied=False)],
                         ids=['tied', 'untied'])
def test_llama_cpp_s_own_quantiser_writes_the_same_bytes(tmp_path, over, kind):
    "The recipe of the mixtures, what takes the place of a K-quant, and each block"
    if not (lib := os.environ.get('SLM_LIBLLAMA')):
        pytest.skip('needs SLM_LIBLLAMA=/path/to/libllama.so of a llama.cpp, such as that in npm\'s @node-llama-cpp/linux-x64')
    m = shaken(**over); kinds = export_gguf(m, TOK, tmp_path/'ours.gguf', kind); export_gguf(m, TOK, tmp_path/'f32.gguf', 'f32')
    subprocess.run([sys.executable, '-c', REFERENCE, lib, tmp_path/'f32.gguf', tmp_path/'theirs.gguf', str(E._FILE_TYPES[kind])],
                   check=True, capture_output=True)
    ours, theirs = ({t.name: t for t in GGUFReader(tmp_path/f'{n}.gguf').tensors} for n in ('ours', 'theirs'))
    assert {n: t.tensor_type.name for n,t in ours.items()} == {n: t.tensor_type.name for n,t in theirs.items()} and len(kinds) > 1
    assert [n for n,t in ours.items() if not np.array_equal(t.data, theirs[n].data)] == []

def test_no_k_quant_without_ggml(tmp_path, monkeypatch):
    E._ggml_quantizer.cache_clear(); monkeypatch.setitem(sys.modules, 'xllamacpp', None)
    says(lambda: export_gguf(shaken(d_model=256), TOK, tmp_path/'m.gguf', 'q4_k_m'), '.[serve]', 'q4_0')
    assert not list(tmp_path.iterdir())
    export_gguf(shaken(), TOK, tmp_path/'m.gguf', 'q4_k_m')                      # too narrow for it: plain formats
    monkeypatch.undo(); E._ggml_quantizer.cache_clear(); assert 'Q4_K' in export_gguf(shaken(d_model=256), TOK, tmp_path/'k.gguf', 'q4_k_m')

def test_metadata_of_the_file(tmp_path):
    export_gguf(shaken(vocab_size=410), TOK, tmp_path/'m.gguf', 'f16', 'mine')
    f = {k: v.contents() for k,v in GGUFReader(tmp_path/'m.gguf').fields.items()}
    assert (f['general.name'], f['general.architecture'], f['tokenizer.ggml.pre'],
            f['tokenizer.ggml.add_bos_token']) == ('mine', 'llama', 'gpt-2', False)
    assert (f['tokenizer.ggml.eos_token_id'], f['tokenizer.ggml.eot_token_id']) == (TOK.eot_id, TOK.end_id)
    types = f['tokenizer.ggml.token_type']
    assert [i for i,t in enumerate(types) if t == 3] == sorted(TOK.special_ids.values()) and types[400:] == [5]*10

def test_generation_ends_at_either_end(tmp_path):
    m = shaken()
    for end in (TOK.eot_id, TOK.end_id):
        export_gguf(m, TOK, tmp_path/'m.gguf', 'f32')
        r = LlamaCpp(tmp_path/'m.gguf').post('/completion', prompt=[0, 5], n_predict=8, temperature=-1., logit_bias=[[end, 1000.]])
        assert r['stop_type'] == 'eos' and r['tokens_predicted'] == 1

@pytest.mark.parametrize('pre', PRE_TOKENIZERS)
def test_each_split_that_has_a_name(tmp_path, pre):
    d = json.loads(TOK.tok.to_str()); t = tokenizers.Tokenizer.from_str(json.dumps(d)); t.pre_tokenizer = PRE_TOKENIZERS[pre]
    if pre == 'llama-bpe': d = json.loads(t.to_str()); d['model']['ignore_merges'] = True; t = tokenizers.Tokenizer.from_str(json.dumps(d))
    tok = Tokenizer(t); assert pre_tokenizer(tok) == pre
    m = shaken(); export_gguf(m, tok, tmp_path/'m.gguf', 'f16')
    cpp = LlamaCpp(tmp_path/'m.gguf'); texts = nasty_texts(tok, 2000); assert cpp.encode_batch(texts, tok.pad_id) == tok.encode_batch(texts)

def test_what_cannot_be_said_is_refused(tmp_path):
    says(lambda: export_gguf(shaken(act='geglu'), TOK, tmp_path/'m.gguf'), 'geglu', '--to hf')
    says(lambda: export_gguf(shaken(pos='alibi'), TOK, tmp_path/'m.gguf'), "pos='alibi'")
    says(lambda: export_gguf(shaken(rope_scaling=dict(YARN, beta_fast=16.)), TOK, tmp_path/'m.gguf'), 'YaRN', '--to hf')
    chars = char_tokenizer(TEXTS)
    says(lambda: export_gguf(shaken(vocab_size=chars.vocab_size), chars, tmp_path/'m.gguf'), '--tokenizer bpe')
    assert not list(tmp_path.iterdir())

# ---- the gate closes

def tampered(tmp_path, tok=TOK, change=None, kind='f32'):
    m, bad = shaken(), shaken()
    with torch.no_grad(): (change or (lambda x: None))(bad)
    export_gguf(bad, tok, tmp_path/'m.gguf', kind); return failed(check_llama_cpp(m, TOK, tmp_path/'m.gguf', kind, few()))

def test_a_lost_merge(tmp_path):
    d = json.loads(TOK.tok.to_str()); d['model']['merges'].pop(3)
    assert 'f32 tokens' in tampered(tmp_path, Tokenizer(tokenizers.Tokenizer.from_str(json.dumps(d))))

def test_another_template(tmp_path):
    assert tampered(tmp_path, Tokenizer(TOK.tok, TOK.chat_template.replace("'<|'", "' <|'"))) == ['f32 chat']

@pytest.mark.parametrize('kind', ['f32', 'q4_0'])
def test_a_damaged_weight(tmp_path, kind):
    got = tampered(tmp_path, change=lambda x: x.model.layers[1].mlp.up_proj.weight.mul_(1.3), kind=kind)
    assert f'{kind} weights' in got and ('f32 logits' in got) == (kind == 'f32')

@pytest.mark.parametrize('value', [math.nan, math.inf])
def test_no_number(tmp_path, value):
    assert 'q8_0 weights' in tampered(tmp_path, change=lambda x: x.model.layers[0].mlp.up_proj.weight.fill_(value), kind='q8_0')

def test_a_file_cut_short_fails_its_checks(tmp_path):
    m = shaken(); export_gguf(m, TOK, tmp_path/'m.gguf', 'f32'); whole = (tmp_path/'m.gguf').read_bytes()
    for n in (10, 3000, len(whole)-5000):
        (tmp_path/'m.gguf').write_bytes(whole[:n])
        assert failed(check_export(m, TOK, dict(f32=tmp_path/'m.gguf'), few()))[0] == 'f32 opens'

# ---- the whole

def test_export_leaves_a_whole_folder(tmp_path, run):
    checks = export(run, tmp_path/'out', ('hf', 'f16'), n_tokens=200, n_texts=300)
    assert failed(checks) == []
    assert {c.name for c in checks} >= {'hf tokens', 'hf logits', 'hf chat', 'f32 logits', 'f16 perplexity', 'Modelfile chat'}
    names = {p.name for p in (tmp_path/'out').iterdir()}
    assert names == {'README.md', 'config.json', 'generation_config.json', 'model.safetensors', 'tokenizer.json', 'tokenizer_config.json',
                     'chat-F16.gguf', 'Modelfile', 'export.json'}
    card = (tmp_path/'out'/'README.md').read_text()
    assert 'license: apache-2.0' in card and '## sft: chat' in card and '## pretrain: base' in card
    assert 'FROM ./chat-F16.gguf' in (tmp_path/'out'/'Modelfile').read_text()
    assert ('generation' not in json.loads((tmp_path/'out'/'tokenizer_config.json').read_text())['chat_template']
            .replace('add_generation', ''))
    # an earlier export is replaced
    export(run, tmp_path/'out', ('hf',), n_tokens=200, n_texts=100); assert not list((tmp_path/'out').glob('*.gguf'))

def test_a_failed_check_leaves_nothing(tmp_path, run, monkeypatch):
    monkeypatch.setitem(E.PERPLEXITY, 'f32', -1.) # no export is this good
    says(lambda: export(run, tmp_path/'out', ('f32',), n_tokens=200, n_texts=100), 'f32 perplexity', 'nothing was written')
    assert not list(tmp_path.iterdir())

def test_what_passes_is_written_and_what_fails_is_named(tmp_path, run, monkeypatch):
    monkeypatch.setitem(E.PERPLEXITY, 'q8_0', -1.)
    with pytest.raises(E.PartlyExported, match="holds hf, f16; q8_0 was examined, is wrong .q8_0 perplexity") as e:
        export(run, tmp_path/'out', ('hf', 'f16', 'q8_0'), n_tokens=200, n_texts=100)
    assert '\n' not in str(e.value) and failed(e.value.checks) == ['q8_0 perplexity']
    assert {p.name for p in (tmp_path/'out').glob('*.gguf')} == {'chat-F16.gguf'} and (tmp_path/'out'/'model.safetensors').exists()
    said = json.loads((tmp_path/'out'/'export.json').read_text()); assert (said['kinds'], said['failed']) == (['hf', 'f16'], ['q8_0'])

def test_dots_and_dashes_in_a_name_stay(tmp_path, run):
    shutil.copytree(run, tmp_path/'my-v0.3_b'); export(tmp_path/'my-v0.3_b', tmp_path/'out', ('f16',), n_tokens=200, n_texts=50)
    assert (tmp_path/'out'/'my-v0.3_b-F16.gguf').exists() and model_name(tmp_path/'x-v1.2.gguf') == 'x-v1.2'
    assert json.loads((tmp_path/'out'/'export.json').read_text())['model'] == 'my-v0.3_b'

# ---- the end of an answer, everywhere

@pytest.fixture(scope='module')
def taught(tmp_path_factory):
    "A run of sft on a base without a chat template"
    root = tmp_path_factory.mktemp('taught'); base = stranger(root/'base', 'gpt2')
    rows = [dict(prompt=f'what does the {w} {v}?',
                 completion=f'The {w} carries a kettle.') for w in WORDS for v in 'carry hold bring have own take'.split()]
    (root/'rows.jsonl').write_text('\n'.join(map(json.dumps, rows)))
    return sft(base, root/'rows.jsonl', root/'run', steps=60, bs=8, lr=5e-3, evals=1, samples=1, device='cpu', dtype='float32').path

ASKED = [dict(role='user', content='what does the otter carry?')]

@pytest.fixture(scope='module')
def our_answer(taught):
    "What our own generation says; it ends by itself"
    model, tok = load_model_and_tokenizer(taught)
    g = complete(model, [tok.chat(ASKED, True)[0]], SamplingParams(temperature=0, max_new_tokens=60), tok)[0]
    assert g.finish_reason == 'stop' and re.fullmatch(r'The \w+ carries a kettle\.', g.text)
    return g.text

def test_an_answer_of_a_base_without_a_template_ends(taught):
    model, tok = load_model_and_tokenizer(taught); ids = tok.chat(ASKED, True)[0]
    g = complete(model, [ids], SamplingParams(temperature=0, max_new_tokens=60), tok)[0]
    assert (g.finish_reason, g.stop) == ('stop', 0) and g.text.endswith(' carries a kettle.')
    assert tok.special_ids == {'<|endoftext|>': 0} and tok.stop_ids == [0]

def test_transformers_ends_it_there_too(taught, our_answer):
    from transformers import AutoModelForCausalLM, AutoTokenizer
    model, tok = load_model_and_tokenizer(taught)
    hf, net = AutoTokenizer.from_pretrained(taught), AutoModelForCausalLM.from_pretrained(taught)
    ids = hf.apply_chat_template(ASKED, add_generation_prompt=True, return_dict=True)['input_ids']
    assert list(ids) == tok.chat(ASKED, True)[0]
    out = net.generate(torch.tensor([ids]), max_new_tokens=60, do_sample=False)[0][len(ids):].tolist()
    assert out[-1] == 0 and tok.decode(out) == our_answer

def test_llama_cpp_and_ollama_end_it_there_too(taught, our_answer, tmp_path):
    export(taught, tmp_path/'out', ('f16',), n_tokens=1000, n_texts=100); f, = (tmp_path/'out').glob('*.gguf'); tok = Tokenizer.from_gguf(f)
    r = LlamaCpp(f).post('/v1/chat/completions', messages=ASKED, max_tokens=60, temperature=0)['choices'][0]
    assert (r['finish_reason'], r['message']['content']) == ('stop', our_answer)
    assert 'PARAMETER stop "<|endoftext|>"' in (tmp_path/'out'/'Modelfile').read_text() and tok.stop_ids == [0]

def test_each_export_of_a_strangers_model_names_its_ends(tmp_path):
    for shape in ('hermes', 'llama3', 'deepseek'):
        model, tok = load_model_and_tokenizer(stranger(tmp_path/shape, shape)); export_gguf(model, tok, tmp_path/'m.gguf', 'f32')
        there = Tokenizer.from_gguf(tmp_path/'m.gguf')
        assert sorted(there.stop_ids) == sorted(tok.stop_ids) and there.names['eos_token'] == tok.names['eos_token']
        assert failed(check_llama_cpp(model, tok, tmp_path/'m.gguf', 'f32', few(tok))) == []
        for end in tok.stop_ids:
            r = LlamaCpp(tmp_path/'m.gguf').post('/completion', prompt=[5, 9], n_predict=8, temperature=-1., logit_bias=[[end, 1000.]])
            assert r['stop_type'] == 'eos' and r['tokens_predicted'] == 1

def test_a_base_without_an_end_is_refused_for_teaching(tmp_path):
    t = bpe(); folder = stranger(tmp_path/'m', 'gpt2', vocab_size=t.get_vocab_size()); t.save(str(folder/'tokenizer.json'))
    (folder/'tokenizer_config.json').unlink()
    says(lambda: sft(folder, tmp_path/'rows.jsonl', tmp_path/'run'), 'no token that ends a text'); assert not (tmp_path/'run').exists()

def test_a_judge_that_is_missing_is_named(tmp_path, run, monkeypatch):
    monkeypatch.setattr(E, 'find_spec', lambda n: None)
    checks = export(run, tmp_path/'out', ('hf', 'q8_0'), n_tokens=200, n_texts=100); off = [c for c in checks if c.passed is None]
    assert {c.name for c in off} >= {'hf logits', 'q8_0 tokens', 'q8_0 perplexity'} and all('needs: pip install' in c.note for c in off)
    assert all(c.passed for c in checks if c not in off)

def test_bad_input_is_one_line(tmp_path, run):
    (tmp_path/'a').mkdir(); (tmp_path/'a'/'adapter_config.json').touch(); out = tmp_path/'out'
    for kinds,parts in ((('iq2_s',), ["'iq2_s'", 'q4_0']), ((), ['nothing to export'])): says(lambda: export(run, out, kinds), *parts)
    says(lambda: export(tmp_path/'a', out), 'slm merge'); says(lambda: export(run, tmp_path/'a'), 'something else')
    says(lambda: export(run, out, text=tmp_path/'none.txt'), 'none.txt'); says(lambda: export(run, out, push='name'), 'OWNER/NAME')

def test_pushing_without_hub_or_login_is_one_line(tmp_path, monkeypatch):
    import huggingface_hub as hub, huggingface_hub.constants
    for v in ('HF_TOKEN', 'HUGGING_FACE_HUB_TOKEN'): monkeypatch.delenv(v, raising=False)
    monkeypatch.setattr(hub.constants, 'HF_TOKEN_PATH', str(tmp_path/'none')); says(lambda: push_ready('me/model'), 'hf auth login')
    monkeypatch.setenv('HF_TOKEN', 'hf_x'); (tmp_path/'f').mkdir(); (tmp_path/'f'/'README.md').touch()
    code = ("import sys; from slm.serve.export import *; from slm.core import SLMError\ntry: push_folder(sys.argv[1], "
            "'me/model')\nexcept SLMError as e: print(e)")
    r = subprocess.run([sys.executable, '-c', code, str(tmp_path/'f')], capture_output=True, text=True,
                       env=dict(os.environ, HF_ENDPOINT='http://127.0.0.1:9'))
    assert 'is complete, but could not be pushed' in r.stdout and r.stdout.count('\n') == 1 and (
        tmp_path/'f'/'README.md').exists(), r.stdout+r.stderr

GO = '''package main
import ("encoding/json"; "os"; "text/template")
type Message struct { Role, Content string }
func main() {
    var in struct { Template string; Chats [][]Message }
    if err := json.NewDecoder(os.Stdin).Decode(&in); err != nil { panic(err) }
    t := template.Must(template.New("").Parse(in.Template))
    for _, c := range in.Chats {
        if err := t.Execute(os.Stdout, map[string]any{"Messages": c}); err != nil { panic(err) }
        os.Stdout.Write([]byte{0})
    }
}
'''
HELPFUL = """{% if messages[0]['role'] != 'system' %}<|system|>Help "them".<|end|>\n{% endif %}{% for m in messages %}<|{{ m['role'] \
}}|>{{ m['content'] }}<|end|>
{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"""

@pytest.mark.slow
@pytest.mark.parametrize('template', [TOK.chat_template, HELPFUL], ids=['ours', 'with a default system message'])
def test_go_reads_the_modelfile_s_template_as_meant(tmp_path, template):
    "Ollama's templates are those of Go's text/template"
    if not shutil.which('go'): pytest.skip('needs Go')
    tok = Tokenizer(TOK.tok, template); text = modelfile(tok, 'm.gguf', 128); (tmp_path/'main.go').write_text(GO)
    chats = [[dict(role=r, content=c) for r,c in chat] for chat in E.CHATS]
    said = dict(template=re.search('TEMPLATE """(.*?)"""', text, re.S)[1], chats=chats)
    out = subprocess.run(['go', 'run', 'main.go'], input=json.dumps(said), cwd=tmp_path, capture_output=True, text=True, check=True,
                         env=os.environ | dict(GOFLAGS='-mod=mod', GO111MODULE='off', GOCACHE=str(tmp_path/'go')))
    assert out.stdout.split('\0')[:-1] == [tok.render_chat(c, True) for c in chats]
