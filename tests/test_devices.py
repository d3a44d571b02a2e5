"""The same model, the same numbers on every device: forward, backward, resume, generate.

The processor is the reference, and runs through the same tests; mps and cuda are skipped, with a line that says so, where they are not.
"""
import copy, json, os, pytest, subprocess, sys, torch
from pathlib import Path
from slm.core import set_seed, rng_state, set_rng_state
from slm.model.gpt import GPT, GPTConfig

def usable(device):
    "None when `device` computes, else the reason why not"
    if device == 'cpu': return None
    there = torch.cuda.is_available() if device == 'cuda' else torch.backends.mps.is_available()
    if not there: return f'skipped: this machine has no {device}'
    try: (torch.ones(8, 8, device=device)@torch.ones(8, 8, device=device)).sum().item()
    except RuntimeError as e: return f'skipped: {device} is there, but does not compute ({str(e).splitlines()[0]})'

@pytest.fixture(scope='module', params=['cpu', 'mps', 'cuda'])
def device(request):
    if (why := usable(request.param)): pytest.skip(why)
    return request.param

@pytest.fixture(scope='module')
def pair(device):
    "One model on the processor and its copy on the device; ids (b,t) and documents (b,n) of both rows"
    set_seed(0)
    ref = GPT(GPTConfig(vocab_size=97, n_layer=2, d_model=64, n_head=4, n_kv_head=2, max_seq_len=64))
    return ref, copy.deepcopy(ref).to(device), torch.randint(0, 97, (2, 48)), torch.tensor([[20, 28], [48, 0]])

def close(a, b, rtol=1e-3):
    "Largest difference against the largest value"
    return (a.cpu()-b.cpu()).abs().max() <= rtol*b.abs().max()

@pytest.mark.parametrize('packed', [False, True])
def test_forward_equals_the_processor_s(pair, device, packed):
    ref, model, idx, seqlens = pair
    kw = lambda d: dict(seqlens=seqlens.to(d)) if packed else {}
    with torch.no_grad(): a, b = model(idx.to(device), **kw(device)), ref(idx, **kw('cpu'))
    assert a.device.type == device and a.isfinite().all() and close(a, b)

def test_backward_equals_the_processor_s(pair, device):
    ref, model, idx, _ = pair
    for m, d in ((ref, 'cpu'), (model, device)):
        m.zero_grad(); x = idx.to(d)
        torch.nn.functional.cross_entropy(m(x[:, :-1]).flatten(0, 1), x[:, 1:].flatten()).backward()
    grads = dict(ref.named_parameters())
    for n, p in model.named_parameters():
        assert grads[n].grad.abs().max() > 0 and close(p.grad, grads[n].grad, 1e-2), n

def test_generator_state_goes_back(device):
    set_seed(1); state = rng_state()
    first = torch.rand(4, device=device)
    assert not torch.equal(torch.rand(4, device=device), first)
    set_rng_state(state)
    assert torch.equal(torch.rand(4, device=device), first)

def test_generates_with_cache_what_it_generates_without(pair, device):
    from slm.model.generate import SamplingParams, generate_ids
    _, model, idx, _ = pair
    prompts = [idx[0, :7].tolist(), idx[1, :3].tolist()]
    outs = generate_ids(model, prompts, SamplingParams(temperature=0., max_new_tokens=12))
    assert [len(o) for o in outs] == [12, 12]
    for p, out in zip(prompts, outs):
        for t in out:
            with torch.no_grad(): logits = model(torch.tensor([p], device=device))[0, -1].float().cpu()
            assert logits[t] >= logits.max()-1e-3*logits.abs().max()                 # equal, or a tie within the device's rounding
            p = p+[t]

@pytest.mark.parametrize('rows', [1, 3])
def test_steps_of_fixed_shape_say_the_same(pair, device, rows):
    "On cuda they are recorded and replayed; rows of different length, one that leaves, a second recording behind 128 keys"
    from slm.model.generate import DecodeBatch, SamplingParams
    set_seed(0); model = GPT(GPTConfig(vocab_size=97, n_layer=2, d_model=64, n_head=4, n_kv_head=2, max_seq_len=192)).to(device)
    prompts = [torch.randint(0, 97, (n,)).tolist() for n in (120, 100, 7)[:rows]]; outs = []
    for static in (False, True):
        asked = [SamplingParams(temperature=.8, seed=i, max_new_tokens=40) for i in range(rows)]
        b = DecodeBatch(model, prompts, asked, static=static)
        steps = [b.step() for _ in range(20)]; b.keep([*range(rows)][:2]); steps += [b.step() for _ in range(20)]; outs.append(steps)
        assert (b.still is not None) == static
        if static and device == 'cuda': assert sorted(b.still.recorded) == [128, 160]
    assert [ids for ids,_ in outs[0]] == [ids for ids,_ in outs[1]]
    assert [lp for _,lps in outs[1] for lp in lps] == pytest.approx([lp for _,lps in outs[0] for lp in lps], abs=1e-3)

def test_documents_with_normed_queries_in_autocast(device):
    "The norms leave float32, the values do not"
    set_seed(0); shape = dict(vocab_size=97, n_layer=2, d_model=64, n_head=4, n_kv_head=2, max_seq_len=64, qk_norm=True)
    ref, idx, lens = GPT(GPTConfig(**shape)), torch.randint(0, 97, (2, 48)), torch.tensor([[20, 28], [5, 43]])
    model = copy.deepcopy(ref).to(device)
    with torch.no_grad(), torch.autocast(device, torch.bfloat16): a = model(idx.to(device), seqlens=lens.to(device))
    with torch.no_grad(): assert close(a.float(), ref(idx, seqlens=lens), .05)

@pytest.mark.parametrize('causal', [True, False])
def test_documents_in_16_bits(device, causal):
    "What a card does without a mask is what the processor does with one"
    set_seed(0); shape = dict(vocab_size=97, n_layer=2, d_model=64, n_head=4, n_kv_head=2, max_seq_len=64)
    model = GPT(GPTConfig(**shape, causal=causal)).bfloat16()
    idx, lens = torch.randint(0, 97, (2, 48)), torch.tensor([[20, 28, 0], [5, 3, 39]])
    with torch.no_grad(): a, b = copy.deepcopy(model).to(device)(idx.to(device), seqlens=lens.to(device)), model.float()(idx, seqlens=lens)
    assert close(a.float(), b, .05)

def test_what_fits_depends_on_the_number_format(monkeypatch):
    "125m with 49k tokens on a card of 24 GB: not in float32, but in bfloat16"
    from slm.core import SLMError
    from slm.model import gpt
    monkeypatch.setattr(gpt, 'get_device', lambda name: torch.device('cuda'))
    c,card = GPTConfig.preset('125m', vocab_size=49152),24*2**30
    assert gpt.check_fits(c, 24, 1024, 'cuda', dtype='bfloat16', memory=card)['total']/2**30 == pytest.approx(15.6, abs=.05)
    with pytest.raises(SLMError, match=r'needs about 24\.7 GiB'): gpt.check_fits(c, 24, 1024, 'cuda', memory=card)

def test_a_compiled_pretraining_is_traced_for_training_and_validation_alone(device, tmp_path, monkeypatch):
    "Samples, whose texts grow with each token, are not. The graphs run as they are: what a compiler makes of them is not asked here"
    from functools import partialmethod
    from torch._dynamo.utils import counters
    from slm.train.pretrain import pretrain
    monkeypatch.setattr(torch.nn.Module, 'compile', partialmethod(torch.nn.Module.compile, backend='eager'))
    opts = dict(corpus='pydocs', max_bytes=500_000, vocab_size=512, steps=4, seq_len=64, batch_tokens=512, evals=2, device=device,
                dtype='float32', model=dict(n_layer=2, d_model=64, n_head=2, n_kv_head=1))
    torch._dynamo.reset(); counters.clear()
    run = pretrain(out=tmp_path/'compiled', samples=4, compile=True, **opts); graphs = counters['stats']['unique_graphs']
    assert 0 < graphs <= 3, graphs                                               # to train, to validate, the last rows of the validation
    plain = pretrain(out=tmp_path/'plain', samples=1, compile=False, **opts)
    assert run.metric('valid_loss').value == pytest.approx(plain.metric('valid_loss').value, rel=1e-5)

def test_resumes_where_it_was_interrupted(device, tmp_path):
    from fastai.callback.core import Callback
    from slm.train.pretrain import pretrain, resume
    class StopAfter(Callback):
        order = 85
        def after_batch(self): self.learn.interrupted = self.opt_steps == 5
    opts = dict(corpus='pydocs', max_bytes=500_000, vocab_size=512, steps=12, seq_len=64, batch_tokens=512, evals=1, samples=1,
                device=device,
                dtype='float32', model=dict(n_layer=2, d_model=64, n_head=2, n_kv_head=1))
    cut = pretrain(out=tmp_path/'cut', cbs=[StopAfter()], **opts)
    assert cut.info['status'] == 'interrupted'
    cut, whole = resume(tmp_path/'cut'), pretrain(out=tmp_path/'whole', **opts)
    assert cut.info['status'] == whole.info['status'] == 'done'
    a, b = cut.metric('valid_loss').value, whole.metric('valid_loss').value
    assert a == b if device == 'cpu' else a == pytest.approx(b, rel=1e-3)            # sums on an accelerator come in no fixed order
    assert b < torch.tensor(512.).log()                                              # better than guessing

def test_a_whole_life_from_the_command_line(device, tmp_path, monkeypatch):
    "Each verb that computes, once, tiny; a processor is what all other tests run on"
    from slm.data.world import World
    from slm.train.dpo import Pair, write_preferences
    from typer.testing import CliRunner
    from slm.cli import app
    if device == 'cpu' and 'SLM_LIFE' not in os.environ: pytest.skip('on a processor each verb has tests of its own')
    monkeypatch.chdir(tmp_path); user = lambda text: [dict(role='user', content=text)]
    write_preferences('pairs.jsonl', [Pair(user(p.task.prompt), p.chosen, p.rejected) for p in World(limit=20).preferences(3, 40)])
    def slm(*args):
        r = CliRunner().invoke(app, [*map(str, args), '--device', device])
        assert r.exit_code == 0 and not r.exception, (args[0], r.exception, r.output[-500:])
        return r.output
    few = ('--steps', 2, '--samples', 1, '--evals', 1)
    slm('pretrain', '--corpus', 'world', '--max-bytes', 1_500_000, '--vocab-size', 512, '--seq-len', 256, '--batch-tokens', 1024,
        '--out', 'base', *few)
    chat = ('--data', 'pairs.jsonl', *few)
    slm('sft', 'base', '--data', 'world', '--max-rows', 40, '--bs', 4, '--out', 'sft', *few)
    slm('qlora', 'sft', '--no-four-bit', '--data', 'world', '--max-rows', 40, '--bs', 4, '--out', 'lora', *few)
    slm('dpo', 'sft', '--bs', 4, '--out', 'dpo', *chat); slm('reward', 'sft', '--bs', 4, '--out', 'reward', *chat)
    slm('rlhf', 'sft', '--reward', 'reward', '--bs', 2, '--group', 2, '--max-new-tokens', 8, '--out', 'rlhf', *chat)
    slm('distill', 'base', '--corpus', 'world', '--max-bytes', 1_500_000, '--seq-len', 128, '--batch-tokens', 512, '--out', 'student', *few)
    for run in ('base', 'dpo', 'lora'): slm('generate', run, '--prompt', 'Once', '--max-new-tokens', 4)
    slm('chat', 'sft', '--message', 'Who has the kite?', '--max-new-tokens', 4)
    slm('eval', 'base', '--docs', 10, '--probes', 10)
    (tmp_path/'prompts.jsonl').write_text('{"prompt": {"text": "Once"}}\n')
    slm('toxicity', 'base', '--prompts', 'prompts.jsonl', '--classifier', 'profanity', '--n', 1)
    if device != 'mps': slm('qlora', 'sft', '--data', 'world', '--max-rows', 40, '--bs', 4, '--out', 'qlora', *few)

def test_a_frugal_training_is_the_same_training(tmp_path):
    from slm.model.pretrained import load_model_and_tokenizer
    from slm.train.pretrain import pretrain
    few = dict(max_bytes=400_000, vocab_size=300, seq_len=64, batch_tokens=512, steps=3, evals=1, samples=0, dropout=.1,
               model=dict(n_layer=2, d_model=64))
    runs = [pretrain('world', tmp_path/str(f), frugal=f, **few) for f in (False, True)]
    a,b = (load_model_and_tokenizer(r.path)[0].state_dict() for r in runs)
    assert all(torch.equal(v, b[k]) for k,v in a.items()) and runs[1].info['config']['frugal']

# ---- the check of a card, on what is there

def check(*args):
    tool = Path(__file__).parent.parent/'tools'/'gpu_check.py'
    return subprocess.run([sys.executable, tool, *map(str, args)], capture_output=True, text=True, timeout=900)

def test_the_check_of_a_card_runs_and_writes_what_it_measured(tmp_path):
    r = check('--device', 'cpu', '--quick', '--only', 'training', '--only', 'generation', '--out', tmp_path/'card.json')
    assert r.returncode == 0, r.stdout+r.stderr
    got = json.loads((tmp_path/'card.json').read_text())
    assert got['training']['ok'] and got['generation']['ok'] and got['hardware']['cores']
    row = got['training']['rows']['1m']
    assert row['tokens_per_s']['value'] > 0 < row['estimate_mb'] and row['dtype'] in ('float32', 'bfloat16')
    assert all(v['tokens_per_s'] > 0 for v in got['generation']['rows'].values())

def test_a_part_that_fails_is_named_and_ends_with_1(tmp_path):
    r = check('--device', 'cpu', '--quick', '--only', 'generation', '--out', tmp_path/'card.json')     # there is no model
    assert r.returncode == 1 and 'FAILED: generation' in r.stdout and not json.loads((tmp_path/'card.json').read_text())['generation']['ok']

def test_a_device_that_is_not_there_is_one_line():
    r = check('--device', 'tpu'); assert r.returncode == 2 and 'Traceback' not in r.stderr and 'tpu' in r.stderr.splitlines()[-1]
