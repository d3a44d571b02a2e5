"""Loss, speed and memory of one model in many formats, as `slm serve` gives them: the chart of chapter 53.

    slm exp small-sizes && python bench/formats.py [--runs runs/exp/small-sizes] [--rounds 3] [--stories 100]

Every row of the experiment is written as GGUF in four formats; float32 and the own eight bits are the torch engine's. Loss: stories that no
model has read, whole, by the program that serves them (llama.cpp for GGUF). Speed: stories asked for one after another by a client
over HTTP, with one thread and with two; the formats take turns, the middle round counts, all are kept. Memory: what the server
process holds after that. Writes results/53_exp.small/formats/formats.json.
"""
import argparse, http.client, json, subprocess, sys, tempfile, time
from pathlib import Path
import numpy as np
from slm.core import hardware, versions, write_json
from slm.data.world import World
from slm.eval.lm import doc_nats
from slm.eval.stats import bootstrap_ratio
from slm.model.fast import *
from slm.model.pretrained import load_model_and_tokenizer
from slm.serve.export import LlamaCpp, export_gguf

ROOT = Path(__file__).parents[1]
KINDS = ('q8_0', 'q6_k', 'q4_k_m', 'q4_0')
FORMATS = {'f32': (), 'int8': ('--int8',)} | {k: () for k in KINDS}

def story_bits(run, gguf, kind, stories):
    "What each story costs in a format, its end included"
    model,tok = load_model_and_tokenizer(run)
    if kind in KINDS:
        cpp = LlamaCpp(gguf, 512)
        nats = [cpp.nats([tok.bos_id, *tok.encode(s.text), tok.eot_id], model.cfg.vocab_size).sum() for s in stories]
    else: nats = doc_nats(model.fuse_(int8=kind == 'int8'), tok, [s.text for s in stories])
    return np.asarray(nats)/np.log(2)

def served(path, kind, threads, prompts):
    "Tokens a second that a client sees, and megabytes that the server holds"
    slm = Path(sys.executable).with_name('slm')
    how = ['--engine', 'gguf' if kind in KINDS else 'torch', '--slots', '1', '--threads', str(threads), *FORMATS[kind]]
    with subprocess.Popen([slm, 'serve', path, '--port', '0', *how], stdout=subprocess.PIPE, text=True) as proc:
        try:
            c = http.client.HTTPConnection(proc.stdout.readline().split('http://')[1].split()[0])
            def ready(): c.request('GET', '/readyz'); r = c.getresponse(); r.read(); return r.status == 200
            def ask(i):
                name = path.stem if path.suffix == '.gguf' else path.name
                body = dict(model=name, prompt=prompts[i%len(prompts)], max_tokens=200, temperature=1, seed=i)
                c.request('POST', '/v1/completions', json.dumps(body), {'Content-Type': 'application/json'})
                if 'usage' not in (said := json.loads(c.getresponse().read())): sys.exit(f'{path}: {said}')
                return said['usage']['completion_tokens']
            while not ready(): time.sleep(.1)
            for i in range(3): ask(i)
            t,made,n = time.perf_counter(),0,0
            while time.perf_counter()-t < 4 or n < 3: made += ask(n); n += 1
            status = dict(l.split(':', 1) for l in Path(f'/proc/{proc.pid}/status').read_text().splitlines())
            return made/(time.perf_counter()-t), int(status['VmRSS'].split()[0])/1024
        finally: proc.terminate()

def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter); add = ap.add_argument
    add('--runs', type=Path, default=ROOT/'runs'/'exp'/'small-sizes'); add('--rounds', type=int, default=3)
    add('--stories', type=int, default=100)
    add('--out', type=Path, default=ROOT/'results'/'53_exp.small'/'formats'/'formats.json'); a = ap.parse_args()
    if not a.runs.is_dir(): return print(f"nothing to measure in '{a.runs}': slm exp small-sizes trains the models")
    stories = list(World().stories(51, a.stories)); size = [len(s.text.encode()) for s in stories]
    truth = np.array([s.bits for s in stories])
    prompts = [' '.join(s.text.split()[:3]) for s in stories]; table = []
    with tempfile.TemporaryDirectory() as tmp:
        for run in sorted((p for p in a.runs.iterdir() if (p/'model.safetensors').exists()), key=lambda p: int(p.name)):
            model,tok = load_model_and_tokenizer(run); plain = None
            for kind in FORMATS:
                file = Path(tmp)/f'{run.name}-{kind}.gguf'
                if kind in KINDS: export_gguf(model, tok, file, kind)
                bits = story_bits(run, file, kind, stories); plain = bits if plain is None else plain
                more,cost = (bootstrap_ratio(b, size, unit='bits/byte') for b in (bits-truth, bits-plain))
                table.append(dict(row=run.name, kind=kind, params=model.num_params(), excess=vars(more), cost=vars(cost), rounds=[],
                                  file=(file if kind in KINDS else run/'model.safetensors').stat().st_size/1e6))
                print(run.name, kind, more, flush=True)
        for i in range(a.rounds):
            for threads in (1, 2):
                for r in table:
                    path = Path(tmp)/f"{r['row']}-{r['kind']}.gguf" if r['kind'] in KINDS else a.runs/r['row']
                    speed,mb = served(path, r['kind'], threads, prompts); r['rounds'].append(dict(threads=threads, speed=speed, mb=mb))
                    print(i, threads, r['row'], r['kind'], f'{speed:,.0f} tokens/s, {mb:.0f} MB', flush=True)
    for r in table:
        for t in (1, 2): r[f'speed{t}'] = float(np.median([o['speed'] for o in r['rounds'] if o['threads'] == t]))
        r['mb'] = float(np.median([o['mb'] for o in r['rounds'] if o['threads'] == 1]))
    write_json(a.out, dict(hardware=hardware(), versions=versions(), stories=a.stories, table=table))

if __name__ == '__main__': main()
