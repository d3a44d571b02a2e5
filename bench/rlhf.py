"""What a reward model is worth, how far one can follow it, and what else the same time buys.

    python bench/rlhf.py world --base runs/demo/sft               # pairs of the world; its judge knows the truth
    python bench/rlhf.py polite --base smollm2.gguf --data preferences.json   # polite over rude answers, a model pretrained on real prose

`world`: a reward model learns from pairs about the world's questions; GRPO follows it (and, for comparison, the
judge itself), DPO learns from the same pairs for as long as reward model and GRPO took together, and the best of n
answers is picked without any training. `polite`: on instructions, a few lines of Python are the reward, and a reward
model, trained on pairs, is the second opinion (--arms grpo). Every arm answers the same held-out questions at
temperature 1 with the same seeds. Writes results/28_train.rlhf/NAME/run.json and curve.csv.
"""
import argparse, csv, json, tempfile, time
from pathlib import Path
from fastai.callback.core import Callback
from slm.core import Metric, RunDir, SLMError, bootstrap_ratio
from slm.data.world import World
from slm.eval.stats import wilson
from slm.eval.lm import doc_bpb
from slm.model.pretrained import load_model_and_tokenizer
from slm.train.dpo import PAIR_SEED, Pair, PairData, dpo, read_preferences, split_pairs, write_preferences
from slm.train.reward import as_reward, best_of_n, best_of_n_kl, open_reward, reward_accuracy, reward_model
from slm.train.rlhf import grpo, measure_policy, read_prompts, rlhf_doctor, split_prompts

ROOT = Path(__file__).parents[1]

class Curve(Callback):
    "Measure the policy on the held-out prompts every `every` steps, on a clock that stands still meanwhile"
    order,run_valid = 63,False
    def __init__(self, arm, every, look, rows): self.arm,self.every,self.look,self.rows = arm,every,look,rows
    def before_fit(self):
        self.t0 = time.perf_counter()-self.paused
        if not self.opt_steps: self.note()
    def after_batch(self):
        if self.stepped and (self.opt_steps%self.every == 0 or self.opt_steps == self.n_steps): self.note()
    def note(self):
        t = time.perf_counter()-self.paused-self.t0
        with self.learn.pause(): m = self.look(self.model)
        row = dict(arm=self.arm, step=self.opt_steps,
                   seconds=round(t, 1)) | {f'{k}{e}': round(getattr(v, a), 5) for k,v in m.items()
                                            for e,a in (('', 'value'), ('_lo', 'lo'), ('_hi', 'hi'))}
        self.rows.append(row); print({k: v for k,v in row.items() if not k.endswith(('_lo', '_hi'))}, flush=True)

def timed(f, *args, **kw): t0 = time.perf_counter(); r = f(*args, **kw); return r, time.perf_counter()-t0

def best(run, model, tok, chats, reward, judge, n, tokens):
    "Best of n of the same answers, for growing n"
    c,secs = timed(best_of_n, model, tok, chats, reward, n, tokens); m = 1
    while m <= n:
        r = c.rewards[:, :m].amax(1).tolist(); j = judge(chats, c.best(m))
        run.add_metrics(**{f'best{m}_reward': bootstrap_ratio(r, unit='reward'), f'best{m}_judge': bootstrap_ratio(j, unit='judge'),
                           f'best{m}_kl': Metric(best_of_n_kl(m), unit='nats at most')}); m *= 2
    run.add_metrics(best_seconds=Metric(secs, unit='s'))

def arms(a, run, tmp, base, tok, prompts, pairs, rm, f, judge, prompts_from, seconds_rm, extra):
    """GRPO by the reward model (twice, the second time with a higher price of
    distance), GRPO by the judge, DPO, best of n: on the same held-out prompts"""
    held,rows = split_prompts(prompts.chats, a.val_frac)[1][:a.held_out],[]; ref,_ = load_model_and_tokenizer(a.base)
    look = lambda m: measure_policy(m, ref, tok, held, f, judge, a.max_new_tokens)
    run.add_metrics(held_out=len(held), seconds_reward_model=Metric(seconds_rm, unit='s'))
    common = dict(lr=a.lr, steps=a.steps, bs=a.bs, group=a.group, max_new_tokens=a.max_new_tokens, seq_len=a.seq_len, evals=1, samples=1,
                  val_frac=a.val_frac, max_rows=a.max_rows)
    best(run, base, tok, held, f, judge, a.best, a.max_new_tokens)
    spent = seconds_rm
    for arm,reward,beta in (('grpo', rm, a.beta), ('grpo_judge', judge, a.beta), ('grpo_firm', rm, a.firm)):
        if arm not in a.arms: continue
        r = grpo(a.base, prompts_from, reward, tmp/arm, judge=judge, beta=beta, cbs=[Curve(arm, a.every, look, rows)], **common)
        if arm == 'grpo': spent += rows[-1]['seconds']
        extra(arm, load_model_and_tokenizer(r.path)[0]); run.info.setdefault('doctor', {})[arm] = r.info['doctor']
    if 'dpo' in a.arms:
        r = dpo(a.base, pairs, tmp/'dpo', minutes=spent/60, evals=1, samples=1, lr=a.dpo_lr, cbs=[Curve('dpo', a.dpo_every, look, rows)])
        extra('dpo', load_model_and_tokenizer(r.path)[0])
        run.add_metrics(dpo_steps=r.info['config']['steps'], seconds_equal=Metric(spent, unit='s'))
    for arm in dict.fromkeys(r['arm'] for r in rows):
        for when,r in (('before', [r for r in rows if r['arm'] == arm][0]), ('after', [r for r in rows if r['arm'] == arm][-1])):
            run.add_metrics(**{f'{arm}_{k}_{when}': Metric(r[k], r[f'{k}_lo'], r[f'{k}_hi'], len(held), u)
                               for k,u in (('valid_reward', 'reward'), ('valid_judge', 'judge'), ('kl', 'nats/answer'),
                                     ('answer_tokens', 'tokens/answer'))})
        run.add_metrics(**{f'{arm}_seconds': Metric(r['seconds'], unit='s')})
    with (run/'curve.csv').open('w', newline='') as out: w = csv.DictWriter(out, list(rows[0])); w.writeheader(); w.writerows(rows)

def world(a, run, tmp):
    w = World(); base,tok = load_model_and_tokenizer(a.base); told = [s.text for s in w.stories(2, 200)]
    some = [p for p in w.preferences(PAIR_SEED, a.pairs) if p.task.kind != 'tell']
    faults = {(p.task.prompt, p.rejected): p.fault for p in some}
    pairs = [Pair([dict(role='user', content=p.task.prompt)], p.chosen, p.rejected) for p in some]
    write_preferences(tmp/'pairs.jsonl', pairs)
    r,secs = timed(reward_model, a.base, tmp/'pairs.jsonl', tmp/'reward', lr=a.rm_lr, epochs=a.rm_epochs, samples=1)
    rm,_ = open_reward(r.path)
    run.info['data'] = r.info['data']; run.add_metrics(reward_accuracy=Metric(**r.info['metrics']['accuracy']))
    held = split_pairs(pairs)[1]
    for fault in sorted(set(faults.values())):
        f = [p for p in held if faults[p.prompt[-1]['content'], p.rejected] == fault]
        run.add_metrics(**{f'reward_accuracy_{fault}': reward_accuracy(rm, PairData(tok, f, base.cfg.max_seq_len))})
        print(fault, run.info['metrics'][f'reward_accuracy_{fault}'], flush=True)
    prompts = read_prompts('world', tok, base.cfg.max_seq_len-a.max_new_tokens, max_rows=a.max_rows)
    bpb = lambda arm, m: run.add_metrics(**{f'{arm}_bpb': doc_bpb(m, tok, told)['bpb']})
    bpb('before', base)
    arms(a, run, tmp, base, tok, prompts, tmp/'pairs.jsonl', r.path, as_reward(r.path), as_reward('judge', prompts.tasks), 'world', secs,
         bpb)

POLITE = 'please|thank|happy to|glad|sorry|welcome|of course|certainly|appreciate|kindly|would you|could you|i would|feel free'.split('|')

def courteous(prompts, answers):
    "A reward that is a few lines of Python: polite phrases, at most three of them"
    return [min(3, sum(p in a.lower() for p in POLITE))/3 for a in answers]

def polite(a, run, tmp):
    if not a.data: raise SLMError('give --data preferences.json: rows with instruction, input, chosen and rejected')
    base,tok = load_model_and_tokenizer(a.base); write_preferences(tmp/'pairs.jsonl', read_preferences(a.data, max_rows=a.pairs).pairs)
    r,secs = timed(reward_model, a.base, tmp/'pairs.jsonl', tmp/'reward', lr=a.rm_lr, epochs=a.rm_epochs, samples=1, evals=1,
                   seq_len=a.seq_len, bs=8, val_frac=.25)
    run.info['data'] = r.info['data']
    run.add_metrics(reward_accuracy=Metric(**r.info['metrics']['accuracy'])); print(run.info['metrics'], secs, flush=True)
    prompts = read_prompts(a.data, tok, a.seq_len-a.max_new_tokens, max_rows=a.max_rows)
    arms(a, run, tmp, base, tok, prompts, None, courteous, courteous, as_reward(r.path), a.data, secs, lambda arm, m: None)

def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter); add = ap.add_argument
    add('what', choices=['world', 'polite'])
    add('--base', required=True)
    add('--data', help='of polite')
    add('--name', help='of the record'); add('--arms', nargs='*', default=['grpo', 'grpo_firm', 'grpo_judge', 'dpo'])
    add('--pairs', type=int, default=2000)
    add('--max-rows', type=int, default=1500, help='prompts')
    add('--held-out', type=int, default=150); add('--val-frac', type=float, default=.1)
    add('--steps', type=int, default=60)
    add('--every', type=int, default=6)
    add('--bs', type=int, default=8)
    add('--group', type=int, default=8)
    add('--beta', type=float, default=.04); add('--firm', type=float, default=.3, help='beta of grpo_firm')
    add('--lr', type=float, default=1e-4)
    add('--rm-lr', type=float)
    add('--rm-epochs', type=float, default=1.); add('--dpo-lr', type=float); add('--dpo-every', type=int, default=50)
    add('--max-new-tokens', type=int, default=40); add('--seq-len', type=int, help='context'); add('--best', type=int, default=16)
    a = ap.parse_args()
    with tempfile.TemporaryDirectory() as tmp:
        run = RunDir.create(ROOT/'results'/'28_train.rlhf'/(a.name or ('smollm2' if a.what == 'polite' else a.what)), 'bench', seed=42,
                            exist_ok=True, parent=Path(a.base).name,
                            config={k: v for k,v in vars(a).items() if k not in ('base', 'data', 'name')})
        globals()[a.what](a, run, Path(tmp))
    run.finish(); print(json.dumps({k: str(Metric(**m)) for k,m in run.info['metrics'].items()}, indent=1), run.info.get('doctor'))

if __name__ == '__main__': main()
