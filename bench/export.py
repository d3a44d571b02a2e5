"""What an export loses, judged by the programs that open it: transformers and llama.cpp.

    python bench/export.py NAME MODEL [--tokens 6000] [--kinds hf,f32,f16,q8_0,q4_0] [--text FILE]

Exports MODEL (a run, a Hugging Face folder, a .gguf file) into a temporary folder, through the gate, and writes every figure of the gate, the sizes of the files and
the perplexity before to results/40_serve.export/NAME/run.json. The perplexity is that of our float32 model on held-out text, its interval over documents; the change by a
format is measured on the same tokens in llama.cpp.
"""
import argparse, json, math, re, tempfile, time
from pathlib import Path
from slm.core import Metric, RunDir, bootstrap_ratio
from slm.model.pretrained import load_model_and_tokenizer
from slm.serve.export import export, lineage, material, torch_logprobs

ROOT = Path(__file__).parents[1]

def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument('name'); ap.add_argument('model'); ap.add_argument('--tokens', type=int, default=6000)
    ap.add_argument('--kinds', default='hf,f32,f16,q8_0,q4_0'); ap.add_argument('--text')
    a = ap.parse_args(); kinds = tuple(a.kinds.split(','))
    model,tok = load_model_and_tokenizer(a.model); c = model.cfg; runs = lineage(a.model)
    text = a.text or ('world' if runs and str(runs[-1]['data'].get('name')).startswith('world') else None)
    run = RunDir.create(ROOT/'results'/'40_serve.export'/a.name, 'bench', config=dict(tokens=a.tokens, kinds=kinds, text=a.text and Path(a.text).name or text or "Python's manual",
        model=dict(layers=c.n_layer, width=c.d_model, inner=c.d_ff, vocabulary=c.vocab_size)), parent=Path(a.model).stem, exist_ok=True)
    with tempfile.TemporaryDirectory() as tmp:
        t0 = time.perf_counter(); checks = export(a.model, Path(tmp)/'out', kinds, text=a.text, n_tokens=a.tokens); run.add_metrics(params=model.num_params(), seconds=Metric(time.perf_counter()-t0, unit='s'))
        for k,n in json.loads((Path(tmp)/'out'/'export.json').read_text())['files'].items():
            if m := re.search(r'-(\w+)\.gguf$|model\.safetensors$', k): run.add_metrics(**{f'{(m[1] or "hf").lower()}_bytes': Metric(n, unit='bytes')})
    for k in checks: print(k); run.add_metrics(**({k.name.lower().replace(' ', '_').replace('.', '_'): k.value} if k.value else {}))
    m = material(tok, min(c.max_seq_len, 256), text, a.tokens, 1); nats = [-sum(l[i, t].item() for i,t in enumerate(d[1:])) for d in m.docs for l in [torch_logprobs(model, d)]]
    loss = bootstrap_ratio(nats, [len(d)-1 for d in m.docs]); run.add_metrics(perplexity=Metric(*(math.exp(x) for x in (loss.value, loss.lo, loss.hi)), n=loss.n, unit='perplexity'))
    run.finish()

if __name__ == '__main__': main()
