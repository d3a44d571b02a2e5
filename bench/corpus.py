"""A corpus larger than anybody's patience: generated text through `slm corpus` and `slm tokenize`, each killed half-way and run again.

    python bench/corpus.py [--gb 2] [--vocab 16384] [--work DIR] [--out DIR]

Text with Zipf's tail of rare words, in JSON lines; one document in twenty is an exact copy of an earlier one, one in twenty a near copy,
one in ten has Windows line ends. Recorded for each command: MB/s, processor seconds per second (two cores: at most 2), the peak of
resident memory, and, after SIGKILL, what was kept and that it was not made again. Both ways must end in the same corpus and the same
tokens. Prints JSON and writes DIR/run.json.
"""
import argparse, contextlib, json, os, signal, subprocess, sys, tempfile, time
from pathlib import Path
import numpy as np, psutil
from slm.core import Metric, RunDir, read_json
from slm.data.corpus import Corpus
from slm.data.loaders import TokenData

def write_texts(folder, n_bytes, seed=0, types=400_000, shard=256e6):
    "JSON lines of random passages; returns the number of documents, exact and near copies"
    rng = np.random.default_rng(seed); letters = np.frombuffer(b'etaoinshrdlucmfwygpbvkxqjz', np.uint8)
    lens = np.minimum(2+rng.poisson(np.log(np.arange(1, types+1))/2), 14)
    flat = letters[(rng.zipf(1.3, lens.sum())-1) % 26].tobytes().decode()
    ends = np.cumsum(lens); words = np.array([flat[e-n:e] for e,n in zip(ends, lens)], dtype=object)
    draw = lambda n: words[(types**rng.random(n)).astype(int)-1]                 # Zipf's law: word r about as often as 1/r
    done, n, copies, near, recent, k = 0, 0, 0, 0, [], 0
    while done < n_bytes:
        with open(folder/f'{k:03}.jsonl', 'w') as f:
            begun = done; k += 1
            while done < min(n_bytes, begun+shard):
                dice = rng.random()
                if recent and dice < .05: text = recent[rng.integers(len(recent))]; copies += 1
                elif recent and dice < .1:
                    parts = recent[rng.integers(len(recent))].split(' '); parts[rng.integers(len(parts))] = 'edited'
                    text = ' '.join(parts); near += 1
                else:
                    ws = draw(rng.integers(60, 600)); text = '. '.join(' '.join(ws[i:i+15]) for i in range(0, len(ws), 15))
                    recent = [*recent[-999:], text]
                if dice > .9: text = text.replace('. ', '.\r\n')
                done += f.write(json.dumps(dict(text=text))+'\n'); n += 1
    return n, copies, near

def run(args, home, until=lambda: False):
    "Run a command, watched; kill it when `until()`: exit status, seconds, processor seconds, peak of resident memory in bytes"
    t0 = time.perf_counter()
    p = psutil.Popen([sys.executable, '-m', 'slm.cli', *args], env=os.environ | dict(SLM_HOME=str(home), TQDM_DISABLE='1'),
                     stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    peak, cpu = 0, 0
    while p.poll() is None:
        with contextlib.suppress(psutil.NoSuchProcess):
            peak = max(peak, sum(q.memory_info().rss for q in [p, *p.children(recursive=True)])); cpu = sum(p.cpu_times()[:4])
        if until(): p.send_signal(signal.SIGKILL)
        time.sleep(.02)
    out, err = p.communicate()
    if p.returncode not in (0, -signal.SIGKILL): sys.exit(f"slm {' '.join(args)}: {err.strip()[-500:]}")
    return dict(status=p.returncode, seconds=time.perf_counter()-t0, cpu=cpu, peak=peak, out=out)

def state(home, name):
    "What a file of state says, of the one folder that is being made; {} while there is none"
    return next((read_json(f) for f in home.glob(name)), {})

def measure(rec, work, gb, vocab):
    (texts := work/'texts').mkdir(); whole, killed = work/'whole', work/'killed'
    n, copies, near = write_texts(texts, gb*1e9); size = sum(f.stat().st_size for f in texts.iterdir())
    spec = f'files:{texts}/*.jsonl'; verbs = dict(corpus=['corpus', spec], tokenize=['tokenize', spec, '--vocab-size', str(vocab)])
    figures = dict(documents=Metric(n), exact_copies=Metric(copies), near_copies=Metric(near), bytes=Metric(size, unit='B'))
    stage = lambda: state(killed, 'corpora/.*.stage/stage.json'); shards = lambda: state(killed, 'tokens/*/building.json').get('train', [])
    for verb,args in verbs.items():
        r = run(args, whole)
        figures |= {f'{verb}_seconds': Metric(r['seconds'], unit='s'), f'{verb}_rate': Metric(size/1e6/r['seconds'], unit='MB/s'),
                    f'{verb}_cores': Metric(r['cpu']/r['seconds']), f'{verb}_peak': Metric(r['peak']/1e6, unit='MB')}
        half = dict(corpus=lambda: stage().get('n_bytes', 0) > .4*size,
                    tokenize=lambda: sum(s['n_bytes'] for s in shards()) > .4*size)[verb]
        first = run(args, killed, half); assert first['status'] == -signal.SIGKILL, 'it ended before it could be killed'
        kept = stage()['n_bytes'] if verb == 'corpus' else sum(s['n_bytes'] for s in shards())
        files = {f: f.stat().st_mtime_ns for f in (killed/'corpora').glob('.*.stage/*.npy')} if verb == 'corpus' else \
                {f: f.stat().st_mtime_ns for s in shards() for f in (killed/'tokens').glob(f"*/train/{s['name']}.bin")}
        seen = {}
        def watch(): seen.update({f: f.stat().st_mtime_ns for f in files if f.exists()}); return False
        again = run(args, killed, watch); assert seen == files, 'a finished part was made again'
        figures |= {f'{verb}_kept': Metric(100*kept/size, unit='%'), f'{verb}_parts_kept': Metric(len(files)),
                    f'{verb}_again_seconds': Metric(again['seconds'], unit='s'), f'{verb}_again_peak': Metric(again['peak']/1e6, unit='MB')}
    a, b = (next((h/'corpora').iterdir()) for h in (whole, killed)); a, b = Corpus.open(a), Corpus.open(b)
    s, t = (TokenData.open(next((h/'tokens').iterdir())) for h in (whole, killed))
    same = lambda x, y: {k: [(d['n_tokens'], d['crc32']) for d in m.meta[k]] for m in (x,) for k in ('train', 'valid')} == \
                        {k: [(d['n_tokens'], d['crc32']) for d in m.meta[k]] for m in (y,) for k in ('train', 'valid')}
    assert a.fingerprint == b.fingerprint and a.info['statistics'] == b.info['statistics'] and same(s, t), 'the two ways differ'
    drops = a.stats['dropped']
    rec.add_metrics(**figures, tokens=Metric(s.train.n_tokens+s.valid.n_tokens),
                    **{f'dropped_{k}': Metric(drops[f'{k} duplicate']['documents']) for k in ('exact', 'near')})

def main():
    p = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    p.add_argument('--gb', type=float, default=2.); p.add_argument('--vocab', type=int, default=16384)
    p.add_argument('--work', type=Path, help='folder for some gigabytes that are removed again')
    p.add_argument('--out', type=Path, default=Path(__file__).parents[1]/'results'/'03_data.corpus'/'big')
    a = p.parse_args(); rec = RunDir.create(a.out, 'bench', dict(gb=a.gb, vocab=a.vocab), seed=0, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=a.work) as d: measure(rec, Path(d), a.gb, a.vocab)
    rec.finish(); print((a.out/'run.json').read_text())

if __name__ == '__main__': main()
