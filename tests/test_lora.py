"Adapters: parity with peft in both directions, 4-bit bases and their traps, bad input."
import json, os, subprocess, sys
from pathlib import Path
import pytest, torch

peft = pytest.importorskip('peft', reason="needs: pip install -e '.[qlora]'")
bnb = pytest.importorskip('bitsandbytes', reason="needs: pip install -e '.[qlora]'")
from safetensors.torch import load_file, save_file
from slm.core import SLMError, set_seed
from slm.model.gpt import GPT, GPTConfig, lm_loss, recompute
from slm.train.learner import decay_groups, flatten_state, unflatten_state
from slm.train.lora import *
from slm.train.optim import muon_groups

ROOT = Path(__file__).resolve().parent.parent
KINDS = pytest.mark.parametrize('kind', [{}, dict(rslora=True), dict(dora=True)], ids=['lora', 'rslora', 'dora'])
X = torch.arange(2*48).view(2, 48)*37 % 256

def tiny(seed=0, **kw):
    set_seed(seed); kw = dict(vocab_size=256, n_layer=2, d_model=64, n_head=4, n_kv_head=2, max_seq_len=64) | kw
    return GPT(GPTConfig(**kw)).eval()

def shake(model, seed=7):
    "Weights as if the adapter had been trained"
    g = torch.Generator().manual_seed(seed)
    for k,p in model.named_parameters():
        if p.requires_grad: r = torch.randn(p.shape, generator=g).to(p.device); p.data = p.data*(1+.1*r) if 'magnitude' in k else .1*r
    return model

def off(a, b): return ((a-b).abs().max()/b.abs().max()).item()

@torch.no_grad()
def logits(model, x=X): return model(x)

def says(f, *parts):
    with pytest.raises(SLMError) as e: f()
    assert '\n' not in str(e.value) and all(p in str(e.value) for p in parts), str(e.value)

# ---- adapters

@KINDS
def test_before_the_first_step_nothing_has_changed(kind):
    assert off(logits(add_lora(tiny(), **kind)), logits(tiny())) <= (1e-6 if 'dora' in kind else 0)

@KINDS
def test_our_adapter_opens_in_peft_on_the_export(kind, tmp_path):
    from transformers import AutoModelForCausalLM
    tiny().save_pretrained(tmp_path/'base'); m = shake(add_lora(tiny(), rank=4, **kind)); save_adapter(m, tmp_path/'adapter')
    theirs = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path/'base'), tmp_path/'adapter').eval()
    assert off(logits(m), logits(tiny())) > .1
    with torch.no_grad(): assert off(theirs(input_ids=X).logits, logits(m)) < 1e-5
    assert off(theirs.merge_and_unload()(input_ids=X).logits.detach(), logits(merge(m))) < 1e-5

@KINDS
def test_an_adapter_trained_by_peft_opens_in_ours(kind, tmp_path):
    from transformers import AutoModelForCausalLM
    tiny().save_pretrained(tmp_path/'base'); set_seed(1)
    c = peft.LoraConfig(r=4, lora_alpha=8, target_modules='all-linear', use_dora='dora' in kind, use_rslora='rslora' in kind,
                        task_type='CAUSAL_LM')
    theirs = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path/'base'), c)
    opt = torch.optim.AdamW([p for p in theirs.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(5): theirs(input_ids=X, labels=X).loss.backward(); opt.step(); opt.zero_grad()
    theirs.eval().save_pretrained(tmp_path/'adapter')
    m = load_adapter(GPT.from_pretrained(tmp_path/'base'), tmp_path/'adapter')
    assert off(logits(m), logits(tiny())) > .1
    with torch.no_grad(): assert off(logits(m), theirs(input_ids=X).logits) < 1e-5

@KINDS
def test_merged_is_unmerged(kind, tmp_path):
    m = shake(add_lora(tiny(), rank=4, **kind)); a = logits(m); merged = merge(m)
    assert off(logits(merged), a) < 1e-5 and off(a, logits(tiny())) > .1
    merged.save_pretrained(tmp_path); again = GPT.from_pretrained(tmp_path)
    assert torch.equal(logits(again), logits(merged)) and set(again.state_dict()) == set(tiny().state_dict())
    assert all(p.requires_grad for p in merged.parameters()) and base_fingerprint(merged) != base_fingerprint(tiny())
    add_lora(merged) # as on any other base

def test_only_the_adapter_is_trained_and_kept():
    m = add_lora(tiny(bias=True), rank=4, targets=['q_proj', 'down_proj'])
    names = {k for k,p in m.named_parameters() if p.requires_grad}
    assert names == set(m.state_dict()) and len(names) == 2*2*2 and all('q_proj' in n or 'down_proj' in n for n in names)
    assert {id(p) for g in decay_groups(m) for p in g} == {id(p) for g in muon_groups(m)
                                                           for p in g} == {id(p) for p in m.parameters() if p.requires_grad}
    assert param_counts(m) == dict(trained=sum(v.numel() for v in m.state_dict().values()), all=sum(p.numel() for p in m.parameters()))

def test_an_untied_head_and_a_half_precision_base():
    m = add_lora(tiny(tied=False).to(torch.bfloat16), rank=4)
    assert not any('lm_head' in k for k in m.state_dict()) and {v.dtype for v in m.state_dict().values()} == {torch.float32}
    assert m.lm_head.weight.dtype == torch.bfloat16 and torch.isfinite(logits(m)).all()

def test_what_save_pretrained_means_depends_on_the_adapter(tmp_path):
    m = add_lora(tiny())
    m.save_pretrained(tmp_path/'a')
    assert sorted(p.name for p in (tmp_path/'a').iterdir()) == ['adapter_config.json', 'adapter_model.safetensors']
    merge(m).save_pretrained(tmp_path/'b'); assert (tmp_path/'b'/'model.safetensors').exists()

@KINDS
@pytest.mark.parametrize('four', [False, True])
def test_under_autocast_the_loss_is_that_of_float32_rounded(kind, four):
    m = shake(add_lora(quantize_4bit(tiny()) if four else tiny(), rank=4, **kind)); a = logits(m)
    with torch.autocast('cpu', torch.bfloat16): b = logits(m)
    assert b.dtype == torch.bfloat16 and 1e-4 < ((a-b).norm()/a.norm()).item() < .05

# ---- 4 bits

def gradients(model, x=X):
    model.train(); model.zero_grad(); lm_loss(model(x), x.roll(-1, 1)).backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])

def everything(model):
    "A copy of all bytes that are not trained"
    res = {}
    for k,p in model.named_parameters():
        s = getattr(p, 'quant_state', None)
        if not p.requires_grad:
            res |= {f'{k}{i}': t.detach().clone() for i,t in enumerate([p.data, *((s.absmax, s.state2.absmax, s.offset) if s else ())])}
    return res

@KINDS
@pytest.mark.parametrize('bias', [False, True])
def test_gradients_are_right_before_and_after_an_evaluation(kind, bias):
    "Against the same numbers as floats; bitsandbytes' own layer fails this on AVX512-BF16"
    q,ref = (shake(add_lora(m, rank=4, **kind)) for m in (quantize_4bit(tiny(bias=bias)), dequantize_4bit(quantize_4bit(tiny(bias=bias)))))
    frozen,g = everything(q),gradients(ref)
    for dtype in (None, torch.float32, torch.bfloat16):
        if dtype:
            q.eval()
            with torch.no_grad(), torch.autocast('cpu', dtype, enabled=dtype != torch.float32): q(X)
        assert (gradients(q)-g).norm()/g.norm() < 1e-5, dtype
    opt = adamw8bit(decay_groups(q), lr=1e-2); before = q.state_dict()['model.layers.0.mlp.up_proj.lora_A.default.weight'].clone()
    opt.step(); now = everything(q)
    assert not torch.equal(before, q.state_dict()['model.layers.0.mlp.up_proj.lora_A.default.weight'])
    assert all(torch.equal(frozen[k], now[k]) and frozen[k].dtype == now[k].dtype for k in frozen) and frozen.keys() == now.keys()

@KINDS
def test_merged_into_the_floats_of_the_4_bit_base(kind):
    m = shake(add_lora(quantize_4bit(tiny()), rank=4, **kind)); a = logits(m); merged = merge(m)
    assert (logits(merged)-a).norm()/a.norm() < 1e-5 < .1 < off(a, logits(tiny()))
    assert type(merged.model.layers[0].mlp.up_proj) is torch.nn.Linear

@pytest.mark.parametrize('double,bits', [(True, 4+8/64+32/(64*256)), (False, 4.5)])
def test_bits_for_each_weight(double, bits):
    m = quantize_4bit(tiny(d_model=256, d_ff=1024), double); names = block_linears(m); layers = [m.get_submodule(n) for n in names]
    got = 8*sum(map(weight_bytes, layers))/sum(param_counts(l)['all'] for l in layers)
    assert got == pytest.approx(bits, abs=2e-3) and all(l.weight.quant_state.quant_type == 'nf4' for l in layers)

def test_a_checkpoint_opened_in_4_bits_is_the_one_quantised_afterwards(tmp_path):
    from slm.data.tokenizer import train_bpe
    tok = train_bpe(['a b a b c a b c d a b c d e']*50, 264); kw = dict(vocab_size=tok.vocab_size, tied=False, bias=True)
    tiny(**kw).save_pretrained(tmp_path/'m', tok); q,_ = load_4bit(tmp_path/'m')
    assert torch.equal(logits(q), logits(quantize_4bit(tiny(**kw)))) and base_fingerprint(q) == base_fingerprint(tiny(**kw))
    assert type(q.lm_head) is torch.nn.Linear
    save_adapter(shake(add_lora(q, rank=4)), tmp_path/'a') # trained beside 4 bits, it goes on the floats too
    base = GPT.from_pretrained(tmp_path/'m'); bare = off(logits(base), logits(q))
    assert off(logits(load_adapter(base, tmp_path/'a')), logits(q)) < bare

def test_opening_in_4_bits_never_holds_the_floats(tmp_path):
    from slm.data.tokenizer import train_bpe
    if sys.platform != 'linux': pytest.skip('reads the peak memory of Linux')
    tok = train_bpe(['a b a b c a b c d a b c d e']*50, 264)
    GPT(GPTConfig(vocab_size=tok.vocab_size, n_layer=8, d_model=768, max_seq_len=64)).save_pretrained(tmp_path, tok)
    code = ('import sys, bitsandbytes; from slm.train.lora import *; from slm.train.pretrain import peak_memory; m = peak_memory("cpu")\n'
            'load_4bit(sys.argv[1]); print(peak_memory("cpu")-m)')
    out = subprocess.run([sys.executable, '-c', code, str(tmp_path)], capture_output=True, text=True, check=True,
                         env=os.environ | {'PYTHONPATH': str(ROOT)})
    size = (tmp_path/'model.safetensors').stat().st_size # mapped pages of the file are resident too, once each
    assert int(out.stdout) < 1.5*size, (int(out.stdout), size)

def test_the_state_of_8_bit_adamw_goes_through_our_checkpoints():
    def grads(m, seed):
        set_seed(seed)
        for p in m.parameters():
            if p.requires_grad: p.grad = torch.randn_like(p)
    a,b = (shake(add_lora(tiny(), rank=64)) for _ in range(2)); one,two = (adamw8bit(decay_groups(m), lr=1e-2) for m in (a, b))
    for k in range(3): grads(a, k); one.step()
    b.load_state_dict(a.state_dict()); tensors,plain = flatten_state(one.opt.state_dict())
    assert {t.dtype for t in tensors.values()} == {torch.uint8, torch.float32}
    two.opt.load_state_dict(unflatten_state(tensors, json.loads(json.dumps(plain))))
    for m,o in ((a, one), (b, two)): grads(m, 9); o.step()
    assert all(torch.equal(v, b.state_dict()[k]) for k,v in a.state_dict().items())

def test_recomputed_blocks_give_the_same_gradients_and_still_generate():
    from slm.model.generate import SamplingParams, generate_ids
    a,b = shake(add_lora(tiny())),recompute(shake(add_lora(tiny())))
    assert torch.equal(gradients(a), gradients(b))
    ids = [generate_ids(m.eval(), [[1, 2, 3]], SamplingParams(max_new_tokens=8, temperature=0.)) for m in (a, b)]
    assert ids[0] == ids[1] and len(ids[0][0]) == 8

# ---- bad input

def test_an_adapter_of_another_base_is_one_line(tmp_path):
    save_adapter(add_lora(tiny(), rank=4), tmp_path)
    says(lambda: load_adapter(tiny(1), tmp_path), 'another base', 'it was trained on weights')
    says(lambda: load_adapter(tiny(d_model=128), tmp_path), 'another base', 'the layer here has')
    says(lambda: load_adapter(tiny(n_layer=1), tmp_path), 'another base', 'model.layers.1', 'no layer')
    says(lambda: load_adapter(add_lora(tiny()), tmp_path), 'has an adapter already')

def test_a_damaged_adapter_is_one_line(tmp_path):
    says(lambda: load_adapter(tiny(), tmp_path), 'no adapter_config.json')
    save_adapter(add_lora(tiny(), rank=4), tmp_path); conf,weights = tmp_path/'adapter_config.json',tmp_path/'adapter_model.safetensors'
    whole,d = weights.read_bytes(),json.loads(conf.read_text())
    for bad in (whole[:len(whole)//2], b'', b'nonsense'): weights.write_bytes(bad); says(lambda: load_adapter(tiny(), tmp_path), 'damaged')
    weights.unlink(); says(lambda: load_adapter(tiny(), tmp_path), 'no adapter_model.safetensors')
    sd = {k: v for k,v in add_lora(tiny(), rank=4).state_dict().items()}
    save_file({f"base_model.model.{k.replace('.default', '')}": v for k,v in sd.items() if 'layers.1.mlp' not in k}, weights)
    says(lambda: load_adapter(tiny(), tmp_path), 'disagree on', 'layers.1.mlp')
    weights.write_bytes(whole)
    for change,word in ((dict(peft_type='IA3'), 'IA3'), (dict(modules_to_save=['lm_head']), 'modules_to_save'),
                        (dict(bias='all'), 'biases')):
        conf.write_text(json.dumps(d | change)); says(lambda: load_adapter(tiny(), tmp_path), word)
    conf.write_text('{"peft_type"'); says(lambda: load_adapter(tiny(), tmp_path), 'not valid JSON')
    conf.write_text(json.dumps(d)); load_adapter(tiny(), tmp_path)

def test_without_the_packages_one_line_names_the_extra(monkeypatch):
    m = add_lora(tiny())
    monkeypatch.setitem(sys.modules, 'bitsandbytes', None)
    for f in (lambda: quantize_4bit(tiny()), lambda: load_4bit('x'), lambda: adamw8bit(decay_groups(m))): says(f, 'bitsandbytes', '[qlora]')
    monkeypatch.setitem(sys.modules, 'peft', None)
    for f in (lambda: add_lora(tiny()), lambda: load_adapter(tiny(), 'x')): says(f, 'peft', '[qlora]')

def test_what_cannot_be_asked_for():
    for kw,word in ((dict(rank=0), 'rank'), (dict(rank=1.5), 'rank'), (dict(alpha=0), 'alpha'), (dict(dropout=1.), 'dropout'),
                    (dict(targets=['w']), "'w'"), (dict(targets=[]), 'all-linear')): says(lambda: add_lora(tiny(), **kw), word)
    says(lambda: merge(tiny()), 'no adapter'); says(lambda: save_adapter(tiny(), 'x'), 'no adapter')
    says(lambda: quantize_4bit(add_lora(tiny())), 'adapter')

def test_a_folder_that_cannot_be_written_leaves_nothing(tmp_path):
    (tmp_path/'file').write_text('x')
    says(lambda: save_adapter(add_lora(tiny()), tmp_path/'file'/'adapter'), 'cannot write the adapter')
    assert [p.name for p in tmp_path.iterdir()] == ['file']

# ---- the stages

@pytest.fixture(scope='module')
def base(tmp_path_factory):
    "A folder with a model and its tokenizer, and some conversations"
    from slm.data.tokenizer import train_bpe
    root = tmp_path_factory.mktemp('stage'); tok = train_bpe(['what colour is the key lamp boat ring ? it is red blue green .']*50, 300)
    tiny(vocab_size=tok.vocab_size).save_pretrained(root/'base', tok)
    rows = [dict(prompt=f'{w} the {k}?', completion=f'it is {v}.') for k,v in dict(key='red', lamp='blue', boat='green', ring='red').items()
            for w in ('what is', 'what colour is', 'colour of', 'is', 'what', 'which is', 'say', 'tell', 'name', 'see', 'look at', 'find')]
    (root/'rows.jsonl').write_text('\n'.join(map(json.dumps, rows)))
    return root

KW = dict(steps=8, lr=2e-2, bs=4, evals=1, samples=1, seq_len=64)

@pytest.mark.parametrize('stage', [lora, qlora], ids=['lora', 'qlora'])
def test_a_run_with_an_adapter_and_the_plain_run_of_it(base, tmp_path, stage):
    run = stage(base/'base', base/'rows.jsonl', tmp_path/'a', frugal=True, **KW)
    assert (run.info['stage'], run.info['status']) == (stage.__name__, 'done') and run.info['config']['four_bit'] == (stage is qlora)
    assert run.info['config']['opt'] == ('adamw8bit' if stage is qlora else 'adamw') and str(base) not in (run/'run.json').read_text()
    assert run.metric('valid_bpb').value < run.metric('valid_bpb_before').value
    assert json.loads((run/'adapter_config.json').read_text())['base_model_name_or_path'] == 'base'
    says(lambda: merge_run(run.path, tmp_path/'m'), 'cannot be opened', '--base') # neither where it was named, nor beside
    merged = merge_run(run.path, tmp_path/'m', base/'base'); assert merged.info['parent'] == 'a'
    from slm.model.pretrained import load_model_and_tokenizer
    m,_ = load_model_and_tokenizer(merged.path); q,_ = open_adapter_run(run.path, base/'base')
    assert off(logits(m), logits(q)) < 1e-5 < off(logits(m), logits(GPT.from_pretrained(base/'base')))
    again = stage(merged.path, base/'rows.jsonl', tmp_path/'b', **KW); assert again.info['parent'] == 'm' # as any other base

def test_a_stage_that_cannot_begin_leaves_nothing(base, tmp_path, monkeypatch):
    go = lambda b=base/'base', d=base/'rows.jsonl', f=lora, **kw: lambda: f(b, d, tmp_path/'out', **(KW | kw))
    says(go(rank=0), 'rank must be'); says(go(targets='x_proj'), 'x_proj'); says(go(b=tmp_path/'nowhere'), 'nowhere')
    says(go(d=tmp_path/'no.jsonl'), 'no.jsonl'); says(go(lr=3.), '--lr')
    save_adapter(add_lora(tiny()), tmp_path/'adapter'); says(go(b=tmp_path/'adapter'), 'is an adapter: merge it first')
    monkeypatch.setitem(sys.modules, 'bitsandbytes', None); says(go(f=qlora), 'bitsandbytes', '[qlora]')
    assert not (tmp_path/'out').exists()

def test_an_adapter_s_run_and_another_base(base, tmp_path):
    run = lora(base/'base', base/'rows.jsonl', tmp_path/'a', **KW)
    GPT(GPT.from_pretrained(base/'base').cfg).save_pretrained(tmp_path/'other')
    for f in (base/'base').glob('tokenizer*'): (tmp_path/'other'/f.name).write_bytes(f.read_bytes())
    says(lambda: merge_run(run.path, tmp_path/'m', tmp_path/'other'), 'another base'); assert not (tmp_path/'m').exists()
    says(lambda: merge_run(tmp_path/'other', tmp_path/'m'), 'not a run directory')
    (tmp_path/'m').mkdir()
    (tmp_path/'m'/'run.json').write_text('{}'); says(lambda: merge_run(run.path, tmp_path/'m', base/'base'), 'already holds a run')

def test_a_run_goes_on_when_its_base_has_moved(base, tmp_path):
    import shutil
    from fastai.callback.core import Callback
    from slm.train.pretrain import resume
    class StopAfter(Callback):
        order = 85
        def after_batch(self): self.learn.interrupted = self.opt_steps == 3
    shutil.copytree(base/'base', tmp_path/'here'); lora(tmp_path/'here', base/'rows.jsonl', tmp_path/'cut', cbs=[StopAfter()], **KW)
    (tmp_path/'here').rename(tmp_path/'there'); says(lambda: resume(tmp_path/'cut'), 'here', 'does not exist')
    says(lambda: resume(tmp_path/'cut', corpus='pydocs'), '--corpus means nothing')
    assert resume(tmp_path/'cut', base=tmp_path/'there').info['status'] == 'done'

def test_a_run_does_not_go_on_from_another_base(base, tmp_path):
    import shutil
    from fastai.callback.core import Callback
    from slm.train.pretrain import resume
    from slm.train.sft import sft
    class StopAfter(Callback):
        order = 85
        def after_batch(self): self.learn.interrupted = self.opt_steps == 3
    sft(base/'base', base/'rows.jsonl', tmp_path/'cut', cbs=[StopAfter()], **KW)
    other = shutil.copytree(base/'base', tmp_path/'other'); m = GPT.from_pretrained(other)
    with torch.no_grad(): m.model.norm.weight += .1
    m.save_pretrained(other); says(lambda: resume(tmp_path/'cut', base=other), 'is not the model that', '--base')
    assert resume(tmp_path/'cut', base=shutil.copytree(base/'base', tmp_path/'same')).info['status'] == 'done'

def test_a_flipped_bit_of_an_adapter_is_noticed(base, tmp_path):
    run = lora(base/'base', base/'rows.jsonl', tmp_path/'a', **KW); f = run/'adapter_model.safetensors'
    b = bytearray(f.read_bytes()); b[-50] ^= 1; f.write_bytes(b)
    says(lambda: open_adapter_run(run.path, base/'base'), 'adapter_model.safetensors', 'SHA-256')

def test_a_4_bit_model_is_not_saved_as_if_it_were_plain(tmp_path):
    says(lambda: quantize_4bit(tiny()).save_pretrained(tmp_path/'x'), 'no adapter to save'); assert not (tmp_path/'x').exists()
    dequantize_4bit(quantize_4bit(tiny())).save_pretrained(tmp_path/'y'); GPT.from_pretrained(tmp_path/'y')
    says(lambda: dequantize_4bit(add_lora(quantize_4bit(tiny()))), 'merge it')

@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA device')
def test_gradients_are_right_on_cuda():
    q,ref = (shake(add_lora(m, rank=4)) for m in (quantize_4bit(tiny().cuda()), dequantize_4bit(quantize_4bit(tiny().cuda()))))
    x = X.cuda(); g = gradients(ref, x)
    for _ in range(2): assert (gradients(q, x)-g).norm()/g.norm() < 1e-3; logits(q.eval(), x)
    a = logits(q, x); assert off(logits(merge(q), x), a) < 1e-3
