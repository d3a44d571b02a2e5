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
    some = pairs[:4]; rm = RewardModel.on(tiny(tok)); rm.save_pretrained(tmp_path/'rm', tok); tok.save(tmp_path/'rm'); write_preferences(tmp_path/'p.jsonl', some)
    args = TheirConfig(output_dir=str(tmp_path/'out'), per_device_train_batch_size=4, max_length=None, center_rewards_coefficient=center or None, **COMMON)
    t = RewardTrainer(transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path/'rm', dtype=torch.float32), args=args,
                      processing_class=transformers.AutoTokenizer.from_pretrained(tmp_path/'rm'), train_dataset=datasets.Dataset.from_list([json.loads(l) for l in (tmp_path/'p.jsonl').open()]))
    batch = next(iter(t.get_train_dataloader())); t.model.eval(); want,out = t.compute_loss(t.model, dict(batch), return_outputs=True)
    dl = RewardLoader(PairData(tok, some, 512), 4); dl.order = lambda epoch: range(4); x,_,_,lens = dl.at(0, 0)
    theirs_ids = sorted(tuple(r[m.bool()].tolist()) for r,m in zip(batch['input_ids'], batch['attention_mask'])); assert theirs_ids == sorted(tuple(r[:n].tolist()) for r,n in zip(x, lens))
    scores = rm(x, None, lens); loss = reward_loss(scores, center)
    assert loss.item() == pytest.approx(want.item(), abs=1e-5) and sorted(scores.tolist()) == pytest.approx(sorted(out.logits[:, 0].tolist()), abs=1e-5)
    loss.backward(); want.backward(); same_gradients(rm, t.model)

@pytest.mark.parametrize('beta,moves', [(0., True), (.3, False), (.3, True)])
def test_a_step_s_loss_is_trl_s(beta, moves, tok, pairs, tmp_path):
    "Advantages, loss and gradients of trl's GRPOTrainer for the same completions and rewards, within 1e-4; with a policy that has moved since it gave them"
    pytest.importorskip('trl', reason='needs: pip install trl')
    import datasets, transformers
    from trl import GRPOConfig as TheirConfig, GRPOTrainer
    old = tiny(tok); ref = moved(old); chats = [p.prompt for p in pairs[:2]]; k = 4; set_seed(0)
    given = lambda prompts, answers: [len(a)%7/3 for a in answers]
    dl = RolloutLoader(old, tok, chats, given, ref, group=k, bs=2, max_new_tokens=12); x,y,mask,_ = dl.at(0, 0); roll = dl.rollout
    policy = moved(old, .05, 2) if moves else old
    for name,m in (('policy', policy), ('ref', ref), ('old', old)): m.save_pretrained(tmp_path/name, tok); tok.save(tmp_path/name)
    hf = {n: transformers.AutoModelForCausalLM.from_pretrained(tmp_path/n, dtype=torch.float32) for n in ('policy', 'ref', 'old')}
    rewards = roll.rewards.flatten().tolist()
    args = TheirConfig(output_dir=str(tmp_path/'out'), per_device_train_batch_size=2*k, num_generations=k, max_completion_length=12, beta=beta, num_iterations=2, **COMMON)
    t = GRPOTrainer(hf['old'], reward_funcs=lambda completions, **kw: rewards, args=args, processing_class=transformers.AutoTokenizer.from_pretrained(tmp_path/'old'),
                    train_dataset=datasets.Dataset.from_list([dict(prompt=c) for c in chats]))
    if beta: t.ref_model = hf['ref'].eval()
    t._generate_single_turn = lambda *a, **kw: ([a for _,a in roll.rows], None)
    t._tokenize_prompts = lambda *a, **kw: ([p for p,_ in roll.rows], None, {})
    order = [i for i in dl.state_order] if hasattr(dl, 'state_order') else None
    t.model.train(); t.current_gradient_accumulation_steps = 1
    inputs = t._generate_and_score_completions([dict(prompt=c) for c in chats for _ in range(k)]); assert inputs['advantages'].tolist() == pytest.approx(roll.advantages.tolist(), abs=1e-5)
    want = t._compute_loss(hf['policy'].train(), inputs)
    learn_loss = GRPO(beta).kw; lens = [len(a) for _,a in roll.rows]
    logp = lambda m: torch.cat([l for l in -torch.nn.functional.cross_entropy(m(x).transpose(1, 2), y, reduction='none').masked_select(mask).split(lens)])
    loss,kl,clipped = grpo_loss(logp(policy), logp(old).detach(), torch.cat(roll.ref), roll.advantages.repeat_interleave(torch.tensor(lens)), **learn_loss)
    assert loss.item() == pytest.approx(want.item(), abs=1e-4); policy.zero_grad(); loss.backward(); want.backward(); same_gradients(policy, hf['policy'])
    assert (clipped > 0) == moves and kl > 1e-3 and (abs(want.item()) > .01 or not (beta and moves))
