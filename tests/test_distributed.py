"Several processes train one model: real ones, over gloo, started as a user starts them."
import contextlib, json, os, signal, socket, subprocess, sys, threading, time
import pandas as pd, pytest
from slm.core import SLMError
from slm.train.distributed import join_ranks, launch, step_traffic
from slm.train.learner import checkpoints
from slm.train.pretrain import pretrain

TINY = dict(n_layer=2, d_model=64, n_head=2, n_kv_head=2, head_dim=32, d_ff=192)
TEXT = dict(corpus='pydocs', max_bytes=400_000, preset='1m', batch_tokens=1024, seq_len=64, device='cpu', dtype='float32')

def script(path, code):
    "A script that meets the others first"
    path.write_text('import sys\nfrom slm.train.distributed import join_ranks\nranks = join_ranks()\n'+code); return path

@pytest.fixture(scope='module')
def base(tmp_path_factory):
    "A small model of the world that can be taught"
    out = tmp_path_factory.mktemp('distributed')/'base'
    pretrain('world:0.02', out, max_bytes=100_000, preset='1m', model=TINY, steps=20, seq_len=512, batch_tokens=2048, device='cpu',
             dtype='float32')
    return out

STAGES = '''
import sys
from slm.train.sft import sft
from slm.train.dpo import dpo
from slm.train.reward import reward_model
from slm.train.rlhf import grpo
from slm.train.distill import distill
from slm.train.lora import lora
base,out = sys.argv[1:]
kw = dict(device='cpu', dtype='float32', opt='adamw', seed=3, evals=1, samples=1)
sft(base, 'chats.jsonl', f'{out}/sft', steps=3, bs=8, micro_batch=4, seq_len=64, **kw)
lora(base, 'chats.jsonl', f'{out}/lora', steps=3, bs=8, micro_batch=4, seq_len=64, **kw)
dpo(base, 'pairs.jsonl', f'{out}/dpo', steps=3, bs=8, micro_batch=4, **kw)
reward_model(base, 'pairs.jsonl', f'{out}/reward', steps=3, bs=8, **kw)
grpo(base, 'chats.jsonl', out=f'{out}/rlhf', steps=1, group=4, bs=4, micro_batch=2, max_new_tokens=8, reward='lengths:by_length', **kw)
distill(base, 'world:0.02', f'{out}/distill', max_bytes=100_000, steps=3, batch_tokens=1024, seq_len=64, model=%r, **kw)
''' % TINY

def test_every_stage_learns_the_same_in_two_processes(base, tmp_path, monkeypatch):
    (tmp_path/'lengths.py').write_text('def by_length(prompts, answers): return [float(len(a)%7) for a in answers]\n')
    monkeypatch.chdir(tmp_path); turn = lambda role, s: dict(role=role, content=s)
    asked = [f'What comes after {i}?' for i in range(40)]; said = [f'After {i} comes {i+1}.'*(1+i%3) for i in range(40)]
    rows = lambda path, rs: path.write_text('\n'.join(map(json.dumps, rs)))
    rows(tmp_path/'chats.jsonl', [dict(messages=[turn('user', q), turn('assistant', a)]) for q,a in zip(asked, said)])
    rows(tmp_path/'pairs.jsonl', [dict(prompt=q, chosen=a, rejected='No.'*(1+len(q)%4)) for q,a in zip(asked, said)])
    monkeypatch.syspath_prepend(tmp_path); monkeypatch.setattr('sys.argv', ['', str(base), str(tmp_path/'1')]); exec(STAGES, {})
    assert launch(2, [script(tmp_path/'stages.py', STAGES), base, tmp_path/'2']) == 0
    for stage in 'sft lora dpo reward rlhf distill'.split():
        one,two = (pd.read_csv(tmp_path/str(n)/stage/'log.csv') for n in (1, 2))
        assert len(one) == len(two) and (one.loss-two.loss).abs().max() < 2.5e-5, stage
        assert ((one.grad_norm-two.grad_norm).abs() <= 1e-4*one.grad_norm).all() and one.grad_norm.min() > 1e-3, stage
        same = [c for c in one if c not in ('tokens_per_s', 'mfu', 'tokens', 'accuracy') and one[c].notna().any()] # at first all are ties
        assert set(same) > {'loss', 'lr'} and all((one[c]-two[c]).abs().max() <= 1e-3*max(1, one[c].abs().max()) for c in same), stage
        assert (tmp_path/'2'/stage/'report.md').exists() and json.loads((tmp_path/'2'/stage/'run.json').read_text())['processes'] == 2

def options(**more): return [o for k,v in (TEXT | more).items() for o in (f"--{k.replace('_', '-')}", str(v))]
def together(verb, nproc, *args): return launch(nproc, ['-m', 'slm.cli', verb, *args, '--nproc', nproc])

@contextlib.contextmanager
def when_saved(out, step, do):
    "Do something beside, as soon as there is a checkpoint of this step or a later one"
    def wait():
        while not any(int(c.name) >= step for c in checkpoints(out/'checkpoints')): time.sleep(.02)
        do()
    t = threading.Thread(target=wait, daemon=True); t.start(); yield; t.join(5); assert not t.is_alive()

def test_interrupted_by_two_it_goes_on_by_four(tmp_path, capfd):
    asked = dict(steps=12, opt='adamw'); out = tmp_path/'run'; pretrain(out=tmp_path/'alone', **TEXT, **asked); capfd.readouterr()
    with when_saved(out, 1, lambda: os.kill(os.getpid(), signal.SIGINT)):
        assert together('pretrain', 2, *options(**asked), '--save-minutes', .001, '--out', out) == 130
    said = capfd.readouterr()
    assert 'slm resume' in said.out and said.err.splitlines() == ['stopping after this step; press Ctrl-C again to stop at once']
    assert 0 < int(checkpoints(out/'checkpoints')[-1].name) < 12 and together('resume', 4, out) == 0
    a,b = (pd.read_csv(tmp_path/k/'log.csv') for k in ('alone', 'run')); assert (a.loss-b.loss).abs().max() < 1.5e-5 and len(a) == 12

def test_what_cannot_be_dealt_is_said_in_one_line(tmp_path, capfd):
    assert together('pretrain', 2, *options(steps=2, micro_batch=3), '--out', tmp_path/'x') == 2
    said = capfd.readouterr().err.strip(); assert '--micro-batch' in said and '\n' not in said and not (tmp_path/'x').exists()
    with pytest.raises(SLMError, match='--nproc'): launch(0, [])

def test_one_that_fails_takes_the_others_with_it(tmp_path, capfd):
    code = "import time\nif ranks.rank: sys.exit('slm: error: no room on this disk')\nranks.any(False)\ntime.sleep(60)\n"
    t = time.monotonic(); assert launch(2, [script(tmp_path/'fails.py', code)]) == 2 and time.monotonic()-t < 40
    assert 'process 1 of 2: no room on this disk' in capfd.readouterr().err

LISTENS = '''
import os, psutil
found = {c.laddr.ip for p in (os.getpid(), os.getppid()) for c in psutil.Process(p).net_connections('inet') if c.status == 'LISTEN'}
assert found and all(ip.removeprefix('::ffff:') in ('127.0.0.1', '::1') for ip in found), found
ranks.any(False)
'''

@pytest.mark.skipif(sys.platform != 'linux', reason="needs other processes' sockets")
def test_nobody_outside_of_the_machine_can_come_in(tmp_path): assert launch(2, [script(tmp_path/'listens.py', LISTENS)]) == 0

def test_who_loses_the_others_says_so_and_nothing_else(tmp_path, capfd):
    "Without a launcher, as in a pod: one dies, the other has one line"
    with socket.socket() as s: s.bind(('127.0.0.1', 0)); port = s.getsockname()[1]
    code = script(tmp_path/'dies.py', 'import os\nranks.any(False)\nif ranks.rank: os._exit(9)\nranks.any(False)\nprint("never")\n')
    told = os.environ | dict(WORLD_SIZE='2', MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port))
    both = [subprocess.Popen([sys.executable, code], env=told | dict(RANK=str(r)), stderr=subprocess.PIPE, text=True) for r in range(2)]
    said = [p.communicate(timeout=60)[1] for p in both]
    assert [p.returncode for p in both] == [3, 9] and said[1] == ''
    assert said[0].startswith('slm: error: another process of this training has ended') and said[0].count('\n') == 1

def test_a_checkpoint_leaves_each_process_its_own_momentum(tmp_path):
    "Muon's buffers are gathered for a checkpoint; afterwards nobody holds more than before"
    code = '''
import torch
from slm.train.optim import Muon
torch.manual_seed(0); ps = [torch.nn.Parameter(torch.randn(8, 8)) for _ in range(5)]; opt = Muon(ps)
for p in ps: p.grad = torch.randn(8, 8)
opt.step()
def held(): return {i: opt.state[p]["momentum_buffer"].untyped_storage().nbytes() for i,p in enumerate(ps) if p in opt.state}
before = held(); assert list(before) == [i for i in range(5) if i%2 == ranks.rank] and set(before.values()) == {256}
state = opt.state_dict(); assert len(state["state"]) == 5 and held() == before
opt.load_state_dict(state); assert held() == before
each = ranks.each([state["state"][i]["momentum_buffer"] for i in range(5)]); assert all(torch.equal(a, b) for a,b in zip(*each))
'''
    assert launch(2, [script(tmp_path/'momentum.py', code)]) == 0

def test_the_environment_must_be_whole(monkeypatch):
    monkeypatch.setenv('WORLD_SIZE', '3')
    for k in ('RANK', 'MASTER_ADDR', 'MASTER_PORT'): monkeypatch.delenv(k, raising=False)
    with pytest.raises(SLMError, match='RANK is not set'): join_ranks('cpu')

def test_traffic():
    from slm.model.gpt import GPT, GPTConfig
    cfg = GPTConfig.preset('1m', vocab_size=512); n = GPT(cfg).num_params()
    assert step_traffic(cfg, 1) == 0 and step_traffic(cfg, 2, 'adamw') == 4*n and step_traffic(cfg, 4, 'adamw') == 6*n
    assert step_traffic(cfg, 2) > step_traffic(cfg, 2, 'adamw')
