"""What do questions with options measure, do two programs agree on them, and how much does a model know by heart?

    python bench/tasks.py train accuracy          # three sizes that have read the same towns, at 0, 1 and 5 shots
    python bench/tasks.py agree                   # item by item against lm-eval: its own model, and ours in its interface
    python bench/tasks.py memory                  # how often must a text be read until it can be recited?
    python bench/tasks.py factbook --data factbook.jsonl --model MODEL   # questions about countries, 0, 1 and 5 shots

`agree` needs lm-eval (pip install -e '.[eval]'), `factbook` a file of rows with country, section and text. Writes
results/35_eval.tasks/NAME/run.json.
"""
import argparse, json, random, tempfile, time
from functools import partial
from pathlib import Path
import numpy as np, pandas as pd, torch
from slm.core import Metric, RunDir
from slm.data.world import Task, towns
from slm.eval.stats import wilson
from slm.eval.pairs import open_causal
from slm.eval.lm import run_corpus
from slm.eval.tasks import arc_rows, evaluate_task, harness_model, memorised, read_arc, town_tasks, with_shots
from slm.model.pretrained import load_model_and_tokenizer
from slm.train.pretrain import pretrain, resume

ROOT = Path(__file__).parents[1]
RUNS, SEED, N_TOWNS, SHOTS = ROOT/'runs'/'tasks', 7, 150, (0, 1, 5)
SIZES = dict(tiny=(2, 32), small=(2, 64), middle=(3, 128)) # layers and width

def save_rows(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, 'w') as f: f.writelines(json.dumps(r)+'\n' for r in rows)
    return path

def arc_folder(path, tasks, n_train):
    "Questions as ARC's files; what comes first is for the shots"
    for name,ts in (('Train', tasks[:n_train]), ('Test', tasks[n_train:])): save_rows(path/f'ARC-Easy-{name}.jsonl', arc_rows(ts))
    return path

def sheets(n, seed=0):
    "A town in any order of its passages, and some of its questions with their answers, in a form that is not ARC's"
    rng, (passages,facts) = random.Random(seed), towns(SEED, N_TOWNS)
    for _ in range(n):
        i = rng.randrange(N_TOWNS); ps,fs = passages[4*i:4*i+4],facts[8*i:8*i+8]; rng.shuffle(ps)
        yield ' '.join(ps)+''.join(f'\n\n{f.question}\n{f.answer}' for f in rng.sample(fs, 3))

def train(a, run):
    "Each size reads the same 1.2M tokens"
    text = RUNS/'sheets.jsonl'; text.exists() or save_rows(text, (dict(text=t) for t in sheets(12_000)))
    for name,(layers,width) in SIZES.items():
        if (RUNS/name/'checkpoints').exists(): resume(RUNS/name)
        elif not (RUNS/name/'model.safetensors').exists():
            pretrain(f'files:{text}', RUNS/name, steps=300, vocab_size=1024, seq_len=256, batch_tokens=4096, evals=2, samples=1, seed=0,
                     device='cpu', model=dict(n_layer=layers, d_model=width))
    arc_folder(RUNS/'arc', town_tasks(SEED, N_TOWNS), 200)

def accuracy(a, run):
    points = []
    for name in SIZES:
        params = load_model_and_tokenizer(RUNS/name)[0].num_params()
        for k in SHOTS:
            ev = evaluate_task(RUNS/name, 'arc_easy', RUNS/'arc', shots=k)
            run.info['chance'] = ev.info['chance']; run.add_metrics(**{f'{name}_{k}shot_{m}': ev.metric(m) for m in ('acc', 'acc_norm')})
            points += [dict(size=name, params=params, shots=k, rule=m,
                            **{x: getattr(ev.metric(m), x) for x in ('value', 'lo', 'hi', 'n')}) for m in ('acc', 'acc_norm')]
            print(points[-2], flush=True)
    pd.DataFrame(points).to_csv(run/'points.csv', index=False, float_format='%.5g')

def peer(folder):
    "lm-eval's own model on the same weights and token ids"
    from lm_eval.models.huggingface import HFLM
    from transformers import PreTrainedTokenizerFast
    tok = load_model_and_tokenizer(folder)[1]; name = lambda i: tok.tok.id_to_token(i)
    fast = PreTrainedTokenizerFast(tokenizer_object=tok.tok, eos_token=name(tok.eot_id), bos_token=name(tok.bos_id),
                                   pad_token=name(tok.pad_id))
    return HFLM(pretrained=str(folder), tokenizer=fast, device='cpu', batch_size=32, dtype='float32')

YAML = '''task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    train: {folder}/ARC-Easy-Train.jsonl
    test: {folder}/ARC-Easy-Test.jsonl
output_type: multiple_choice
training_split: train
test_split: test
doc_to_text: "Question: {{{{question}}}}\\nAnswer:"
doc_to_target: "{{{{choices.label.index(answerKey)}}}}"
doc_to_choice: "{{{{choices.text}}}}"
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
  - {{metric: acc_norm, aggregation: mean, higher_is_better: true}}
'''

def asked(lm, folder, shots):
    "What lm-eval makes of a model: nats of each option, and both verdicts on each question; and the seconds that the model took"
    import logging, lm_eval; from lm_eval.tasks import TaskManager
    logging.getLogger('lm_eval').setLevel(logging.ERROR); (folder/'towns.yaml').write_text(YAML.format(name='towns', folder=folder))
    inner,took = lm.loglikelihood,[]
    def timed(*args, **kw): t0 = time.perf_counter(); r = inner(*args, **kw); took.append(time.perf_counter()-t0); return r
    lm.loglikelihood = timed
    r = lm_eval.simple_evaluate(lm, tasks=['towns'], task_manager=TaskManager(include_path=str(folder), include_defaults=False),
                                num_fewshot=shots, bootstrap_iters=0); del lm.loglikelihood
    s = sorted(r['samples']['towns'], key=lambda s: s['doc_id'])
    return [np.array([float(x[0][0]) for x in d['resps']]) for d in s], np.array([[d['acc'], d['acc_norm']] for d in s]), sum(took)

def agree(a, run):
    "The same questions asked by lm-eval with its own model, by lm-eval with ours in its interface, and by us"
    path = RUNS/'small'
    model,tok,score = open_causal(path, 'cpu'); same,diff,secs = {'own': [], 'adapter': []}, {'own': [], 'adapter': []}, []
    with tempfile.TemporaryDirectory() as tmp:
        folder = arc_folder(Path(tmp), town_tasks(SEED, N_TOWNS), 200)
        rows = lambda name: [('', json.loads(l)) for l in open(folder/f'ARC-Easy-{name}.jsonl')]
        hf = peer(path)
        for k in SHOTS:
            nats,verdicts,took = asked(hf, folder, k); items = list(read_arc(rows('Test'))); t0 = time.perf_counter()
            ours = [x for _,x,_ in score(with_shots(items, list(read_arc(rows('Train'))), k))]
            secs.append((k, time.perf_counter()-t0, took))
            ours_v = np.array([[np.argmax(y) == it.about[0] for y in (x, x/[len(o)-1 for o in it.options])] for it,x in zip(items, ours)],
                              dtype=float)
            adapted,adapted_v,_ = asked(harness_model(model, tok), folder, k)
            for name,x,v in (('own', ours, ours_v), ('adapter', adapted, adapted_v)):
                same[name] += (v == verdicts).all(1).tolist(); diff[name] += [float(abs(p-q).max()) for p,q in zip(x, nats)]
            run.add_metrics(**{f'lm_eval_{k}shot_acc': wilson(int(verdicts[:, 0].sum()), len(items), 'of questions'),
                               f'ours_{k}shot_acc': wilson(int(ours_v[:, 0].sum()), len(items), 'of questions')})
            print(k, {n: (sum(s), len(s), max(diff[n])) for n,s in same.items()}, secs[-1], flush=True)
    for name in same:
        run.add_metrics(**{f'agreement_{name}': wilson(sum(same[name]), len(same[name]), 'of questions'),
                           f'largest_difference_{name}': Metric(max(diff[name]), n=len(diff[name]), unit='nats')})
    run.add_metrics(**{f'speed_{k}shot_{who}': Metric(len(items)/s, n=len(items), unit='questions/s') for k,x,y in secs
                       for who,s in (('ours', x), ('lm_eval', y))})
    import lm_eval; run.info['config'] |= dict(harness=lm_eval.__version__, model='small')

def memory(a, run):
    "One model, the documents of 48 towns (but those that the split holds out), read again and again; the unread ones are of other towns"
    docs = lambda seed: [' '.join(ps[4*i:4*i+4]) for ps in [towns(seed, 48)[0]] for i in range(48)]
    text = save_rows(RUNS/'recite.jsonl', (dict(text=t) for t in docs(21))); points = []
    for epochs in (5, 20, 50, 100):
        path = RUNS/f'recite_{epochs}'
        if not (path/'model.safetensors').exists():
            n = 45*110*epochs # tokens: about 45 documents are left after the split
            pretrain(f'files:{text}', path, steps=max(10, n//2048), vocab_size=512, seq_len=256, batch_tokens=2048, evals=1, samples=1,
                     seed=0, device='cpu', dropout=0., lr=.006, model=dict(n_layer=3, d_model=128))
        model,tok = load_model_and_tokenizer(path)
        r = RunDir.open(path); seen = r.info['data']['epochs']; read = partial(run_corpus(r, f'files:{text}').docs, 'train')
        for k in (8, 16, 32):
            res,floor = memorised(model, tok, read, docs(22), n=48, k=k, m=32)
            points += [dict(epochs=seen, k=k, measure=m, value=x.value, lo=x.lo, hi=x.hi, n=x.n, floor=floor.get(m)) for m,x in res.items()]
            run.add_metrics(**{f'{m}_epochs{epochs}_k{k}': x for m,x in res.items()})
            print(epochs, seen, k, {m: str(x) for m,x in res.items()}, flush=True)
    pd.DataFrame(points).to_csv(run/'points.csv', index=False, float_format='%.5g')

def country_tasks(path, seed=0):
    "Questions of `bench/rag.py` with three answers that are right for other countries; each kind at most 60 times"
    from rag import FIELDS, questions
    rng, res, asked = random.Random(seed), [], questions(path, n=None)
    for kind in (q.partition('{}')[0] for _,q,_ in FIELDS):
        qs = [(q, right) for q,right,_ in asked if q.startswith(kind)]
        for q,right in qs[:60]:
            others = sorted({r for _,r in qs}-{right})
            if len(others) > 2: res.append(Task('factbook', q, right, sorted([right, *rng.sample(others, 3)])))
    rng.shuffle(res); return res

def factbook(a, run):
    "No passages: what does the model know of the world by itself?"
    with tempfile.TemporaryDirectory() as tmp:
        folder = arc_folder(Path(tmp), country_tasks(a.data), 200); run.info['parent'] = Path(a.model).name
        for k in SHOTS:
            ev = evaluate_task(a.model, 'arc_easy', folder, Path(tmp)/'ev', shots=k, limit=a.limit); run.info['chance'] = ev.info['chance']
            run.add_metrics(**{f'{k}shot_{m}': ev.metric(m) for m in ('acc', 'acc_norm')}); print(k, ev.info['metrics'], flush=True)

def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument('what', choices=['train', 'accuracy', 'agree', 'memory', 'factbook'], nargs='+')
    ap.add_argument('--data', help='the factbook'); ap.add_argument('--limit', type=int, default=300, help='questions of the factbook')
    ap.add_argument('--model', help='run, folder, hub id or .gguf file; for the factbook'); a = ap.parse_args()
    for what in a.what:
        run = what != 'train' and RunDir.create(ROOT/'results'/'35_eval.tasks'/what, 'bench', dict(threads=torch.get_num_threads()),
                                                seed=0, exist_ok=True)
        globals()[what](a, run)
        if run: run.finish(); print(json.dumps(run.info['metrics'], indent=1))

if __name__ == '__main__': main()
