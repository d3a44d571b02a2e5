"""Do the engines say the same? Greedy texts of many prompts, against the plain model of chapter 12.

    python bench/parity.py runs/demo/dpo --name world
    python bench/parity.py smollm2.gguf --name smollm2

The rule: the same tokens, up to the first place where the plain model's two candidates are closer than --tie nats.
`torch`, compiled or not, and `gguf f32` must keep it for every prompt; for the 8-bit engines the share of equal
texts and the gap at the first difference are drift, and reported. Writes
results/44_serve.batching/parity-NAME/run.json.
"""
import argparse, statistics, tempfile, time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from pydoc_data.topics import topics
from slm.core import Metric, RunDir
from slm.data.world import World
from slm.eval.stats import wilson
from slm.model.generate import SamplingParams, generate_ids
from slm.model.pretrained import load_model_and_tokenizer
from slm.serve.batching import TorchEngine, logprob_gap
from slm.serve.engine import GGUFEngine, Request, pieces
from slm.serve.export import export_gguf

ROOT = Path(__file__).parents[1]

def tokens(engine, requests):
    "Text and token ids of each"
    def collect(r): ps = list(pieces(engine, r)); return ''.join(p.text for p in ps), [t.id for p in ps for t in p.logprobs]
    with ThreadPoolExecutor(len(requests)) as ex: return list(ex.map(collect, requests))

def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter); add = ap.add_argument
    add('model')
    add('--name', default='world')
    add('--prompts', type=int, default=200); add('--tokens', type=int, default=64); add('--tie', type=float, default=1e-3)
    a = ap.parse_args()
    fresh = lambda: load_model_and_tokenizer(a.model)
    model, tok = fresh()
    if a.name == 'world': prompts = [tok.chat([dict(role='user', content=t.prompt)], True)[0] for t in World().tasks(seed=9, n=a.prompts)]
    else: text = '\n'.join(topics.values()); prompts = [tok.encode(text[i*997:][:40+i]) for i in range(a.prompts)]
    run = RunDir.create(ROOT/'results'/'44_serve.batching'/f'parity-{a.name}', 'bench',
                        dict(model=a.name, prompts=a.prompts, tokens=a.tokens, tie=a.tie), seed=9, exist_ok=True)
    ends = set(tok.stop_ids)
    truth = []
    for i in range(0, len(prompts), 8):
        truth += generate_ids(model, prompts[i:i+8], SamplingParams(temperature=0, max_new_tokens=a.tokens), stop_ids=list(ends))
    with tempfile.TemporaryDirectory() as tmp:
        for k in ('f32', 'q8_0'): export_gguf(model, tok, Path(tmp)/f'{k}.gguf', k)
        own = lambda slots, **kw: lambda: TorchEngine(*fresh(), slots=slots, context=512, **kw)
        kinds = {'torch': own(8), 'torch one': own(1), 'torch compiled': own(4, compiled=True), 'torch compiled one': own(1, compiled=True),
                 'gguf f32': lambda: GGUFEngine(Path(tmp)/'f32.gguf', 8, 512), 'torch int8': own(8, int8=True),
                 'torch int8 compiled': own(4, int8=True, compiled=True),
                 'gguf q8_0': lambda: GGUFEngine(Path(tmp)/'q8_0.gguf', 8, 512)}
        for name,make in kinds.items():
            t = time.perf_counter(); engine = make()
            got = tokens(engine, [Request(p, a.tokens, temperature=0, logprobs=0) for p in prompts]); engine.close()
            gaps = [None if tok.decode(x) == text else logprob_gap(model, p, x, y) for p,x,(text,y) in zip(prompts, truth, got)]
            gaps = [g for g in gaps if g is not None]; over = [g for g in gaps if g > a.tie]
            key = name.replace(' ', '_')
            run.add_metrics(**{f'{key}_equal': wilson(len(prompts)-len(gaps), len(prompts), 'of texts'),
                               f'{key}_breaks': Metric(len(over), n=len(prompts), unit='texts that break the rule'),
                               f'{key}_gap': Metric(max(gaps, default=0.), n=len(gaps), unit='nats at most where texts part'),
                               f'{key}_gap_median': Metric(statistics.median(gaps) if gaps else 0., n=len(gaps), unit='nats')})
            print(f'{name:11} {len(prompts)-len(gaps)} of {len(prompts)} equal, {len(over)} break the rule, '
                  f'largest gap {max(gaps, default=0):.2g}, {time.perf_counter()-t:.0f} s', flush=True)
    run.finish()

if __name__ == '__main__': main()
