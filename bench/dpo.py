"""What preference training brings, measured on held-out tasks and pairs.

    python bench/dpo.py world --base runs/demo/sft      # the world's judge prefers, the model's own answers are the pairs
    python bench/dpo.py polite --data preferences.json --base smollm2.gguf   # polite over rude answers, 990 pairs

`world`: the base (a model fine-tuned on the world's chats) answers each task several times, the judge says which
answer is best, and these judgements are trained on. Win rate, pass rate, and what the held-out stories cost, before
and after. `polite`: preference accuracy on held-out pairs. Writes results/25_train.dpo/NAME/run.json and log.csv.
"""
import argparse, json, shutil, tempfile, time
from pathlib import Path
from slm.core import Metric, RunDir, SLMError
from slm.data.world import World
from slm.eval.stats import wilson
from slm.eval.lm import doc_bpb
from slm.model.pretrained import load_model_and_tokenizer
from slm.train.dpo import dpo, preference_accuracy, win_rate
from slm.train.sft import answer

ROOT = Path(__file__).parents[1]
TASKS, HELD_OUT = 21, 22 # seeds of stories that nothing else has

def ask(t): return [dict(role='user', content=t.prompt)]

def fitting(model, tok, world, seed, n):
    "Tasks whose prompt leaves room for an answer"
    return [t for t in world.tasks(seed, n) if len(tok.chat(ask(t), True)[0]) <= model.cfg.max_seq_len-40]

def world_pairs(a, base, tok, world, path):
    "Judgements of the world on the base's own answers, in an annotation store"
    from slm.train.annotate import PreferenceStore, judge_with, make_items
    tasks = {t.prompt: t for t in fitting(base, tok, world, TASKS, a.tasks)}; store = PreferenceStore(path)
    for kinds,tokens in ((lambda k: k != 'tell', 40), (lambda k: k == 'tell', a.story_tokens)):
        some = [t for t in tasks.values() if kinds(t.kind)]
        store.add_items([i for k in range(0, len(some),
                                          16) for i in make_items(base, tok, map(ask, some[k:k+16]), n=a.answers, run=Path(a.base).name,
                                                                  seed=1000*k, max_new_tokens=tokens)])
    def judge(messages, texts):
        rank = [(v.passed, v.score) for v in (world.judge(tasks[messages[-1]['content']], t) for t in texts)]
        return 'tie' if rank.count(max(rank)) > 1 else rank.index(max(rank))
    judge_with(store, judge, 'world'); n = len(store.pairs()); store.close(); return n

def answers(model, tok, tasks, a, **kw):
    "Answers to tasks; stories may be long"
    res = {}
    for told,n in ((False, 40), (True, a.story_tokens)):
        some = [i for i,t in enumerate(tasks) if (t.kind == 'tell') == told]
        res |= zip(some, answer(model, tok, [ask(tasks[i]) for i in some], max_new_tokens=n, **kw))
    return [res[i] for i in range(len(tasks))]

def world(a, run):
    w = World(); base,tok = load_model_and_tokenizer(a.base); t0 = time.perf_counter()
    with tempfile.TemporaryDirectory() as tmp:
        n = world_pairs(a, base, tok, w, Path(tmp)/'answers.db'); t1 = time.perf_counter()
        trained = dpo(a.base, Path(tmp)/'answers.db', a.out, beta=a.beta, lr=a.lr, epochs=a.epochs, loss=a.loss); t2 = time.perf_counter()
    after,_ = load_model_and_tokenizer(trained.path)
    tasks = fitting(base, tok, w, HELD_OUT, a.held_out); told = [s.text for s in w.stories(2, 300)]
    run.add_metrics(pairs=n, seconds_answers=Metric(t1-t0, unit='s'), seconds_training=Metric(t2-t1, unit='s'))
    said = {k: answers(m, tok, tasks, a) for k,m in (('before', base), ('after', after))}
    run.add_metrics(win_rate=win_rate(w.judge, tasks, said['before'], said['after']))
    for kind in ('all', 'questions', 'tell'):
        some = [i for i,t in enumerate(tasks) if kind == 'all' or (t.kind == 'tell') == (kind == 'tell')]
        run.add_metrics(**{f'judge_{kind}_{k}': wilson(sum(w.judge(tasks[i], s[i]).passed for i in some), len(some), 'of tasks')
                           for k,s in said.items()})
        if kind != 'all':
            run.add_metrics(**{f'win_rate_{kind}': win_rate(w.judge, [tasks[i] for i in some],
                                                            *([s[i] for i in some] for s in said.values()))})
    bpb = {k: doc_bpb(m, tok, told)['bpb'] for k,m in (('before', base), ('after', after))}
    run.add_metrics(**{f'bpb_{k}': m for k,m in bpb.items()}, bpb_rise=Metric(100*(bpb['after'].value/bpb['before'].value-1), unit='%'))
    return trained

def polite(a, run):
    if not a.data: raise SLMError('give --data preferences.json: rows with instruction, input, chosen and rejected')
    t0 = time.perf_counter()
    trained = dpo(a.base, a.data, a.out, beta=a.beta, lr=a.lr, epochs=a.epochs, loss=a.loss, max_rows=a.max_rows, val_frac=.25, bs=8,
                  evals=2, samples=1)
    run.add_metrics(seconds_training=Metric(time.perf_counter()-t0, unit='s')); return trained

def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument('what', choices=['world', 'polite'])
    ap.add_argument('--base', required=True)
    ap.add_argument('--data', help='of polite')
    ap.add_argument('--max-rows', type=int, help='of polite'); ap.add_argument('--name', help='of the record')
    ap.add_argument('--out', help='keep the run here')
    ap.add_argument('--tasks', type=int, default=600); ap.add_argument('--answers', type=int, default=4)
    ap.add_argument('--held-out', type=int, default=400); ap.add_argument('--story-tokens', type=int, default=400)
    ap.add_argument('--beta', type=float, default=.1)
    ap.add_argument('--lr', type=float); ap.add_argument('--epochs', type=float, default=1.); ap.add_argument('--loss', default='sigmoid')
    a = ap.parse_args()
    with tempfile.TemporaryDirectory() as tmp:
        a.out = Path(a.out or Path(tmp)/'run')
        run = RunDir.create(ROOT/'results'/'25_train.dpo'/(a.name or a.what), 'bench', seed=42, exist_ok=True, parent=Path(a.base).name,
                            config={k: v for k,v in vars(a).items() if k not in ('out', 'base', 'data', 'name')})
        trained = globals()[a.what](a, run); run.info['data'] = trained.info['data']; run.info['doctor'] = trained.info['doctor']
        kept = ('likelier_before', 'likelier', 'accuracy', 'kl', 'answer_tokens', 'steps', 'peak_memory', 'params')
        run.add_metrics(**{k: Metric(**m) for k,m in trained.info['metrics'].items() if k in kept})
        shutil.copy(trained/'log.csv', run/'log.csv')
    run.finish(); print(json.dumps(run.info['metrics'], indent=1), run.info['doctor'])

if __name__ == '__main__': main()
