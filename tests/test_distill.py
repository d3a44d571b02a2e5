"Distillation: the loss of trl, the verb, and teachers who cannot teach."
import shutil, warnings
import pytest, torch
from fastai.callback.core import Callback
from slm.core import RunDir, SLMError
from slm.data.tokenizer import train_bpe
from slm.model.gpt import GPT, GPTConfig
from slm.model.pretrained import load_model_and_tokenizer
from slm.train.distill import distill, teacher_kl, teacher_probs
from slm.train.stage import resume

SHAPE = dict(n_layer=1, d_model=64)
SMALL = dict(model=SHAPE, max_bytes=600_000, seq_len=64, batch_tokens=1024, steps=4, evals=1, samples=1, device='cpu')

@pytest.fixture(scope='module')
def teacher(tmp_path_factory):
    "A folder with a model that has learned nothing, and its tokenizer"
    tok = train_bpe(['The old lamp stood by the door of the house. ']*50, 280); path = tmp_path_factory.mktemp('teacher')
    torch.manual_seed(0); GPT(GPTConfig(vocab_size=tok.vocab_size, n_layer=2, d_model=64, max_seq_len=64)).save_pretrained(path, tok)
    return path

@pytest.mark.parametrize('temperature', [.7, 1., 3.])
def test_loss_and_gradient_equal_trl_s(temperature):
    "trl divides by the rows, and leaves out the square of the temperature"
    with warnings.catch_warnings():
        warnings.simplefilter('ignore'); from trl.experimental.gkd import GKDTrainer
    gen = torch.Generator().manual_seed(0); t,z = (2*torch.randn(3, 5, 40, generator=gen) for _ in range(2))
    mask = torch.rand(3, 5, generator=gen) < .7
    a,b = z.clone().requires_grad_(),z.clone().requires_grad_()
    ours = teacher_kl(a, *teacher_probs(t, 40, temperature), mask, temperature)
    labels = torch.where(mask, 1, -100)
    theirs = GKDTrainer.generalized_jsd_loss(b, t, labels, beta=0, temperature=temperature, reduction='sum')*temperature**2/mask.sum()
    ours.backward(); theirs.backward()
    assert torch.allclose(ours, theirs, rtol=1e-5) and torch.allclose(a.grad, b.grad, atol=1e-6)

def test_in_half_precision_it_is_near(rows=300):
    "More rows than are taken at once"
    gen = torch.Generator().manual_seed(0); t,z = (torch.randn(1, rows, 30, generator=gen) for _ in range(2)); said = teacher_probs(t, 8)
    a,b = z.clone().requires_grad_(),z.bfloat16().requires_grad_()
    x,y = teacher_kl(a, *said),teacher_kl(b, *said); x.backward(); y.backward()
    assert y.dtype == torch.float32 and abs(x-y)/x < .01 and (a.grad-b.grad).abs().max()*rows < .01

def test_the_verb_and_a_teacher_that_has_moved(teacher, tmp_path, capsys, monkeypatch):
    from test_cli import run, fails
    few = [x for k,v in SMALL.items() if k != 'model' for x in (f"--{k.replace('_', '-')}", v)]
    done = run('distill', teacher, '--corpus', 'pydocs', *few, '--top-k', 16, '--alpha', .3, '--out', tmp_path/'run')
    assert done.returncode == 0, done.stderr
    run = RunDir.open(tmp_path/'run'); assert run.info['status'] == 'done' and run.info['config']['alpha'] == .3
    assert run.info['stage'] == 'distill' and run.info['parent'] == teacher.name
    assert {'valid_bpb', 'teacher_bpb'} <= set(run.info['metrics'])
    assert 'loss_teacher' in (tmp_path/'run'/'log.csv').read_text().splitlines()[0]
    moved = shutil.copytree(teacher, tmp_path/'moved')
    cut = distill(moved, 'pydocs', tmp_path/'cut', cbs=[Cut()], **SMALL); assert cut.info['status'] == 'interrupted'
    moved.rename(tmp_path/'elsewhere')
    assert 'does not exist' in fails(capsys, monkeypatch, 'resume', tmp_path/'cut')
    other = shutil.copytree(teacher, tmp_path/'other'); cfg = GPTConfig(vocab_size=280, n_layer=1, d_model=64, max_seq_len=64)
    GPT(cfg).save_pretrained(other)
    assert 'name that one with --teacher' in fails(capsys, monkeypatch, 'resume', tmp_path/'cut', '--teacher', other)
    assert resume(tmp_path/'cut', teacher=tmp_path/'elsewhere').info['status'] == 'done'

class Cut(Callback):
    "Somebody asks for an end after two steps"
    def after_step(self): self.learn.interrupted = self.opt_steps >= 2

def test_who_cannot_teach(teacher, tmp_path):
    tok = train_bpe(['The old lamp stood by the door of the house. ']*50, 280)
    GPT(GPTConfig(vocab_size=tok.vocab_size, n_layer=1, d_model=64, max_seq_len=64, causal=False)).save_pretrained(tmp_path/'both', tok)
    with pytest.raises(SLMError, match='looks both ways'): distill(tmp_path/'both', 'pydocs', tmp_path/'never', **SMALL)
    with pytest.raises(SLMError, match='at most the teacher.s 64'):
        distill(teacher, 'pydocs', tmp_path/'never', **SMALL | dict(seq_len=128))
    assert not (tmp_path/'never').exists()

def test_a_teacher_with_empty_rows_behind_its_tokens(tmp_path):
    "Many published models round the table up; the student has only the tokens, whatever the empty rows say"
    tok = train_bpe(['The old lamp stood by the door of the house. ']*50, 280); torch.manual_seed(0)
    m = GPT(GPTConfig(vocab_size=tok.vocab_size+40, n_layer=1, d_model=64, max_seq_len=64))
    with torch.no_grad(): m.model.embed_tokens.weight[tok.vocab_size:] *= 9      # they would be the likeliest
    m.save_pretrained(tmp_path/'wide', tok)
    run = distill(tmp_path/'wide', 'pydocs', tmp_path/'run', **SMALL)
    assert load_model_and_tokenizer(run.path)[0].cfg.vocab_size == tok.vocab_size and run.metric('teacher_bpb').value > 0

def test_a_context_that_is_not_given_fits_the_teacher(teacher, tmp_path):
    "The preset's 256 tokens would be too many"
    run = distill(teacher, 'pydocs', tmp_path/'run', **SMALL | dict(seq_len=None, steps=1)); c = run.info['config']
    assert c['seq_len'] == 64 and c['micro_batch']*c['seq_len'] == c['batch_tokens']

def test_a_teacher_takes_memory_too(teacher, tmp_path, monkeypatch):
    from slm.train.distill import DistillStage
    import slm.train.pretrain
    stage = DistillStage.of(dict(teacher=str(teacher), corpus='pydocs', **SMALL))
    stage.load(); stage.resolve()
    weights = sum(p.nbytes for p in stage.teacher.parameters()); assert weights < stage.held < 10*weights
    monkeypatch.setattr(slm.train.pretrain, 'device_memory', lambda device: stage.held+1000)
    with pytest.raises(SLMError, match='the model needs about'): stage.build()
