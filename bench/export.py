"""What an export loses, judged by the programs that open it: transformers and llama.cpp.

    python bench/export.py NAME MODEL [--tokens 6000] [--kinds hf,f32,f16,q8_0,q4_0] [--text FILE]

Writes MODEL (a run, a Hugging Face folder, a .gguf file) in all kinds into a temporary folder, lets the gate examine
them, and writes every figure of the gate, what it would refuse, the sizes of the files and the perplexity before to
results/40_serve.export/NAME/run.json. The perplexity is that of our float32 model on held-out text, its interval
over documents; the change by a format is measured on the same tokens in llama.cpp.
"""
import argparse, math, tempfile, time
from pathlib import Path
from slm.core import Metric, RunDir, bootstrap_ratio
from slm.model.pretrained import load_model_and_tokenizer
from slm.serve.export import check_export, export_gguf, export_hf, lineage, material, torch_logprobs

ROOT = Path(__file__).parents[1]

def nats(model, docs): return [-sum(l[i, t].item() for i,t in enumerate(d[1:])) for d in docs for l in [torch_logprobs(model, d)]]

def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument('name'); ap.add_argument('model'); ap.add_argument('--tokens', type=int, default=6000)
    ap.add_argument('--kinds', default='hf,f32,f16,q8_0,q4_0'); ap.add_argument('--text')
    a = ap.parse_args(); kinds = tuple(a.kinds.split(','))
    model,tok = load_model_and_tokenizer(a.model); c = model.cfg; runs = lineage(a.model)
    text = a.text or ('world' if runs and str(runs[-1]['data'].get('name')).startswith('world') else None)
    run = RunDir.create(ROOT/'results'/'40_serve.export'/a.name, 'bench',
                        config=dict(tokens=a.tokens, kinds=kinds, text=a.text and Path(a.text).name or text or "Python's manual",
        model=dict(layers=c.n_layer, width=c.d_model, inner=c.d_ff, vocabulary=c.vocab_size)), parent=Path(a.model).stem, exist_ok=True)
    m, tmp = material(tok, min(c.max_seq_len, 256), text, a.tokens), tempfile.TemporaryDirectory()
    with tmp:
        t0, files = time.perf_counter(), {k: Path(tmp.name)/('hf' if k == 'hf' else f'{k}.gguf') for k in kinds}
        for k,f in files.items(): export_hf(model, tok, f, 'model', runs) if k == 'hf' else export_gguf(model, tok, f, k)
        checks = check_export(model, tok, files, m)
        run.add_metrics(params=model.num_params(), seconds=Metric(time.perf_counter()-t0, unit='s'))
        before, tokens = nats(model, m.docs), [len(d)-1 for d in m.docs]
        # the file's weights in our own arithmetic: what is left is the other program's
        for k,f in files.items():
            if k == 'hf': continue
            d = bootstrap_ratio([a-b for a,b in zip(nats(load_model_and_tokenizer(f)[0], m.docs), before)], tokens)
            run.add_metrics(**{f'{k}_weights_alone': Metric(*(100*math.expm1(x) for x in (d.value, d.lo, d.hi)), n=d.n,
                                                            unit='% of the perplexity')})
        for k,f in files.items():
            run.add_metrics(**{f'{k}_bytes': Metric((f/'model.safetensors' if k == 'hf' else f).stat().st_size, unit='bytes')})
    run.info['refused'] = [k.name for k in checks if k.passed is False]
    for k in checks: print(k); run.add_metrics(**({k.name.lower().replace(' ', '_').replace('.', '_'): k.value} if k.value else {}))
    loss = bootstrap_ratio(before, tokens)
    run.add_metrics(perplexity=Metric(*(math.exp(x) for x in (loss.value, loss.lo, loss.hi)), n=loss.n, unit='perplexity'))
    run.finish()

if __name__ == '__main__': main()
