"Reward model and GRPO against trl's trainers, runs that are interrupted and resumed, and input that cannot be used."
import copy, json
import pytest, torch
from fastai.callback.core import Callback
from slm.core import SLMError, set_seed
from slm.data.tokenizer import train_bpe
from slm.data.world import World
from slm.model.gpt import GPT, GPTConfig
from slm.model.pretrained import load_model_and_tokenizer
from slm.train.dpo import Pair, PairData, write_preferences
from slm.train.pretrain import resume
from slm.train.reward import *
from slm.train.rlhf import *

@pytest.fixture(scope='module')
def pairs(): return [Pair([dict(role='user', content=p.task.prompt)], p.chosen, p.rejected) for p in World(limit=20).preferences(3, 120)]

@pytest.fixture(scope='module')
def tok(): return train_bpe((s.text for s in World(limit=20).stories(1, 300)), 420)

def tiny(tok, seed=0):
    set_seed(seed); return GPT(GPTConfig(vocab_size=tok.vocab_size, max_seq_len=512, n_layer=2, d_model=64, n_head=2, n_kv_head=1)).eval()

def moved(model, by=.02, seed=1):
    "A copy whose weights are somewhat different"
    set_seed(seed); model = copy.deepcopy(model)
    with torch.no_grad():
        for p in model.parameters(): p += by*torch.randn_like(p)
    return model

def same_gradients(ours, theirs):
    theirs = dict(theirs.named_parameters())
    for name,p in ours.named_parameters():
        g = theirs[name].grad; assert torch.allclose(p.grad, g, rtol=1e-3, atol=1e-4*g.abs().max().item()+1e-8), name

COMMON = dict(use_cpu=True, bf16=False, gradient_checkpointing=False, report_to='none', save_strategy='no', disable_tqdm=True)

@pytest.mark.parametrize('center', [0., .01])
def test_the_reward_model_s_loss_is_trl_s(center, tok, pairs, tmp_path):
    "Loss and scores within 1e-5, on what trl itself makes of the same pairs"
    pytest.importorskip('trl', reason='needs: pip install trl')
    import datasets, transformers
    from trl import RewardConfig as TheirConfig, RewardTrainer
    some = pairs[:4]
    rm = RewardModel.on(tiny(tok))
    rm.save_pretrained(tmp_path/'rm', tok); tok.save(tmp_path/'rm'); write_preferences(tmp_path/'p.jsonl', some)
    args = TheirConfig(output_dir=str(tmp_path/'out'), per_device_train_batch_size=4, max_length=None,
                       center_rewards_coefficient=center or None, **COMMON)
    t = RewardTrainer(transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path/'rm', dtype=torch.float32), args=args,
                      processing_class=transformers.AutoTokenizer.from_pretrained(tmp_path/'rm'),
                      train_dataset=datasets.Dataset.from_list([json.loads(l) for l in (tmp_path/'p.jsonl').open()]))
    batch = next(iter(t.get_train_dataloader())); t.model.eval(); want,out = t.compute_loss(t.model, dict(batch), return_outputs=True)
    dl = RewardLoader(PairData(tok, some, 512), 4); dl.order = lambda epoch: range(4); x,_,_,lens = dl.at(0, 0)
    theirs_ids = sorted(tuple(r[m.bool()].tolist()) for r,m in zip(batch['input_ids'], batch['attention_mask']))
    assert theirs_ids == sorted(tuple(r[:n].tolist()) for r,n in zip(x, lens))
    scores = rm(x, None, lens); loss = reward_loss(scores, center)
    assert loss.item() == pytest.approx(want.item(), abs=1e-5)
    assert sorted(scores.tolist()) == pytest.approx(sorted(out.logits[:, 0].tolist()), abs=1e-5)
    loss.backward(); want.backward(); same_gradients(rm, t.model)

@pytest.mark.parametrize('beta,moves', [(0., True), (.3, False), (.3, True)])
def test_a_step_s_loss_is_trl_s(beta, moves, tok, pairs, tmp_path):
    """Advantages, loss and gradients of trl's GRPOTrainer for the same completions and
    rewards, within 1e-4; with a policy that has moved since it gave them"""
    pytest.importorskip('trl', reason='needs: pip install trl')
    import datasets, transformers
    from trl import GRPOConfig as TheirConfig, GRPOTrainer
    old = tiny(tok); ref = moved(old); chats = [p.prompt for p in pairs[:2]]; k = 4; set_seed(0)
    given = lambda prompts, answers: [len(a)%7/3 for a in answers]
    dl = RolloutLoader(old, tok, chats, given, ref, group=k, bs=2, max_new_tokens=12); x,y,mask,_ = dl.at(0, 0); roll = dl.rollout
    by = {tuple(tok.chat(c, True)[0]): c for c in chats}; policy = moved(old, .05, 2) if moves else copy.deepcopy(old)
    old.save_pretrained(tmp_path/'old', tok)
    tok.save(tmp_path/'old'); rewards,lens = roll.rewards.flatten().tolist(),[len(a) for _,a in roll.rows]
    args = TheirConfig(output_dir=str(tmp_path/'out'), per_device_train_batch_size=2*k, num_generations=k, max_completion_length=12,
                       beta=beta, num_iterations=2, **COMMON)
    t = GRPOTrainer(transformers.AutoModelForCausalLM.from_pretrained(tmp_path/'old', dtype=torch.float32),
                    reward_funcs=lambda completions, **kw: rewards, args=args,
                    processing_class=transformers.AutoTokenizer.from_pretrained(tmp_path/'old'),
                    train_dataset=datasets.Dataset.from_list([dict(prompt=c) for c in chats]))
    if beta: t.ref_model.load_state_dict(ref.state_dict(), strict=False)
    t._generate_single_turn = lambda *a, **kw: ([a for _,a in roll.rows], None); t.model.train(); t.current_gradient_accumulation_steps = 1
    inputs = t._generate_and_score_completions([dict(prompt=by[tuple(p)]) for p,_ in roll.rows])
    assert [p[m.bool()].tolist() for p,m in zip(inputs['prompt_ids'], inputs['prompt_mask'])] == [p for p,_ in roll.rows]
    assert inputs['advantages'].tolist() == pytest.approx(roll.advantages.tolist(), abs=1e-5)
    t.model.load_state_dict(policy.state_dict(), strict=False); want = t._compute_loss(t.model, inputs)
    logp = lambda m: -torch.nn.functional.cross_entropy(m(x).transpose(1, 2), y, reduction='none')[mask]
    loss,kl,clipped = grpo_loss(logp(policy), logp(old).detach(), torch.cat(roll.ref),
                                roll.advantages.repeat_interleave(torch.tensor(lens)), beta)
    assert loss.item() == pytest.approx(want.item(), abs=1e-4)
    policy.zero_grad(); loss.backward(); want.backward(); same_gradients(policy, t.model)
    assert (clipped > 0) == moves and kl > 1e-3 and abs(want.item()) > 1e-3

# ---- the stages

@pytest.fixture(scope='module')
def base(tok, pairs, tmp_path_factory):
    "A folder with a model, pairs, and a reward model that knows a little"
    path = tmp_path_factory.mktemp('base')
    tiny(tok).save_pretrained(path, tok); tok.save(path); write_preferences(path/'pairs.jsonl', pairs)
    reward_model(path, path/'pairs.jsonl', path/'reward', lr=1e-3, steps=6, samples=1, evals=1, device='cpu', dtype='float32'); return path

OPTS = dict(lr=1e-3, device='cpu', dtype='float32', evals=1, samples=1)
def longer(prompts, answers): return [float(len(a)) for a in answers]

class StopAfter(Callback):
    order = 85
    def __init__(self, n): self.n = n
    def after_batch(self): self.learn.interrupted = self.opt_steps == self.n

def same_weights(a, b):
    a,b = (m.state_dict() for m in (a, b)); assert all(torch.equal(a[k], b[k]) for k in a)

def test_a_reward_model_goes_on_where_it_was_interrupted(base, tmp_path):
    opts = OPTS | dict(base=base, data=base/'pairs.jsonl', steps=8)
    cut = reward_model(out=tmp_path/'cut', cbs=[StopAfter(3)], **opts); assert cut.info['status'] == 'interrupted'
    cut,whole = resume(tmp_path/'cut'),reward_model(out=tmp_path/'whole', **opts)
    assert cut.info['status'] == whole.info['status'] == 'done'
    same_weights(open_reward(cut.path)[0], open_reward(whole.path)[0])
    assert cut.metric('accuracy').value == whole.metric('accuracy').value

def test_a_training_by_reward_goes_on_in_the_middle_of_a_rollout(base, tmp_path):
    "Two steps with the same answers: the answers are in the checkpoint"
    opts = OPTS | dict(base=base, data=base/'pairs.jsonl', reward=base/'reward', judge=longer, steps=5, bs=4, group=3, iterations=2,
                       micro_batch=2, max_new_tokens=8)
    cut = grpo(out=tmp_path/'cut', cbs=[StopAfter(3)], **opts); assert cut.info['status'] == 'interrupted'
    with pytest.raises(SLMError, match='names code as its judge, .*test_rlhf:longer'): resume(tmp_path/'cut')
    cut,whole = resume(tmp_path/'cut', judge=longer),grpo(out=tmp_path/'whole', **opts)
    assert cut.info['status'] == whole.info['status'] == 'done'
    same_weights(*(load_model_and_tokenizer(r.path)[0] for r in (cut, whole)))
    for k in ('valid_reward', 'valid_judge', 'kl', 'answer_tokens'): assert cut.metric(k).value == whole.metric(k).value, k
    assert whole.metric('kl').value > 0 and (whole/'rewards.png').exists() and '# Rewards' in (whole/'report.md').read_text()
    assert whole.info['config']['reward'] == 'reward' and whole.info['config']['judge'].endswith('test_rlhf:longer')

def test_accumulated_batches_are_one_batch(base, tmp_path):
    "A step is the mean over its tokens, however they are dealt"
    runs = [grpo(base, base/'pairs.jsonl', longer, tmp_path/f'{m}', steps=2, bs=4, group=3, micro_batch=m, max_new_tokens=8,
                 **OPTS) for m in (4, 1)]
    a,b = (load_model_and_tokenizer(r.path)[0].state_dict() for r in runs); start = load_model_and_tokenizer(base)[0].state_dict()
    far = max((a[k]-start[k]).abs().max().item() for k in a); assert far > 1e-4
    for k in a: assert (a[k]-b[k]).abs().max().item() < .02*far, k

def test_changed_data_and_lost_rewards_are_not_resumed(base, pairs, tmp_path):
    p = tmp_path/'p.jsonl'
    write_preferences(p, pairs[:40]); few = dict(steps=4, bs=2, group=2, max_new_tokens=8, cbs=[StopAfter(1)], **OPTS)
    grpo(base, p, longer, tmp_path/'a', **few); reward_model(base, p, tmp_path/'b', steps=4, cbs=[StopAfter(1)], **OPTS)
    grpo(base, base/'pairs.jsonl', lambda prompts, answers: [0.]*len(answers), tmp_path/'c', **few); write_preferences(p, pairs[1:41])
    for run,why,named in (('a', 'has changed since', dict(reward=longer)), ('b', 'has changed since', {}),
                          ('c', 'names code as its reward', {}),
                          ('c', 'cannot find the reward', dict(reward='no_such_module:f')),
                          ('b', '--reward means nothing', dict(reward='judge'))):
        with pytest.raises(SLMError, match=why): resume(tmp_path/run, **named)

class Asked(Exception): "With which number format"

def test_every_stage_asks_for_memory_in_its_number_format(base, tmp_path, monkeypatch):
    import slm.train.dpo as D, slm.train.pretrain as P, slm.train.reward as W, slm.train.rlhf as R, slm.train.sft as S
    def ask(*args, dtype='float32', **kwargs): raise Asked(dtype)
    opts = dict(out=tmp_path/'x', steps=1, device='cpu', dtype='bfloat16')
    for module,stage in ((S, lambda: S.sft(base, 'world', max_rows=60, **opts)), (S, lambda: D.dpo(base, base/'pairs.jsonl', **opts)),
                         (S, lambda: W.reward_model(base, base/'pairs.jsonl', **opts)),
                         (S, lambda: R.grpo(base, base/'pairs.jsonl', longer, max_new_tokens=8, **opts)),
                         (P, lambda: P.pretrain('pydocs', max_bytes=500_000, vocab_size=512, seq_len=64, **opts))):
        monkeypatch.setattr(module, 'check_fits', ask)
        with pytest.raises(Asked, match='bfloat16'): stage()

@pytest.mark.parametrize('stage', ['dpo', 'reward'])
def test_prompts_longer_than_the_context_do_not_end_a_stage(stage, base, tmp_path):
    from slm.train.dpo import dpo
    long = [Pair([dict(role='user', content=f'{i} '+'and then '*400)], 'yes, it is.', 'no.') for i in range(20)]
    write_preferences(tmp_path/'long.jsonl', long)
    assert dict(dpo=dpo, reward=reward_model)[stage](base, tmp_path/'long.jsonl', tmp_path/'run', steps=1, bs=2,
                                                     **OPTS).info['status'] == 'done'

def test_a_reward_model_need_not_share_the_tokenizer(base, tmp_path, pairs):
    other = train_bpe((s.text for s in World(limit=20).stories(1, 300)), 380)
    rm = RewardModel.on(tiny(other)); rm.save_pretrained(tmp_path/'rm', other)
    f = as_reward(tmp_path/'rm')
    run = grpo(base, base/'pairs.jsonl', f, tmp_path/'run', steps=1, bs=2, group=2, max_new_tokens=8, **OPTS)
    assert run.info['status'] == 'done'
    train_bpe((s.text for s in World(limit=20).stories(2, 300)), 380).save(tmp_path/'rm')
    with pytest.raises(SLMError, match='checkpoint of another tokenizer'): as_reward(tmp_path/'rm')

def test_minutes_are_kept(base, tmp_path):
    run = grpo(base, base/'pairs.jsonl', longer, tmp_path/'run', minutes=.02, bs=2, group=2, max_new_tokens=8, **OPTS)
    assert run.info['config']['steps'] >= 10

def test_an_annotation_store_is_read(base, tmp_path):
    from slm.train import annotate as A
    store = A.PreferenceStore(tmp_path/'a.db')
    store.add_items([dict(prompt=[dict(role='user', content=f'{i}+{i}?')],
                          responses=[dict(text=str(2*i)), dict(text='no idea')]) for i in range(12)])
    A.judge_with(store, lambda m, texts: texts.index('no idea') ^ 1, 'me'); store.close()
    run = reward_model(base, tmp_path/'a.db', tmp_path/'run', steps=2, **OPTS); assert run.info['data']['train_pairs'] == 11
    assert grpo(base, tmp_path/'a.db', run.path, tmp_path/'rlhf', steps=1, bs=2, group=2, max_new_tokens=8,
                **OPTS).info['data']['train_prompts'] == 11

# ---- the command line

def test_the_command_line_trains_both(base, tmp_path, capfd, monkeypatch):
    import sys
    from slm import cli
    def slm(*args):
        monkeypatch.setattr(sys, 'argv', ['slm', *map(str, args)])
        try: cli.main()
        except SystemExit as e: return e.code or 0, capfd.readouterr()
        return 0, capfd.readouterr()
    if not hasattr(cli, 'rlhf'): pytest.skip('the command line does not have it yet')
    few = ('--device', 'cpu', '--dtype', 'float32', '--lr', '1e-3'); pairs = base/'pairs.jsonl'
    code,out = slm('reward', base, '--data', pairs, '--out', tmp_path/'reward', '--steps', 2, *few)
    assert code == 0 and 'accuracy' in out.out
    (tmp_path/'mine.py').write_text('def short(prompts, answers): return [-len(a) for a in answers]'); monkeypatch.chdir(tmp_path)
    rl = ('rlhf', base, '--data', pairs, '--steps', 1, '--bs', 2, '--group', 2, '--max-new-tokens', 8, *few)
    code,out = slm(*rl, '--reward', 'mine:short', '--judge', tmp_path/'reward', '--out', tmp_path/'rlhf')
    assert code == 0 and 'valid_judge' in out.out
    for args,why in (((*rl, '--reward', 'judge'), '--data world'), ((*rl, '--reward', base), 'no reward model'),
                     ((*rl, '--reward', 'mine:short', '--group', 1), '--group must be'),
                     (('reward', base, '--data', tmp_path/'none.jsonl'), 'none.jsonl')):
        code,out = slm(*args, '--out', tmp_path/'never')
        assert code == 2 and why in out.err and 'Traceback' not in out.err and len(out.err.strip().splitlines()) == 1
    assert not (tmp_path/'never').exists()
