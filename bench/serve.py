"""How fast the engines are beside transformers and llama.cpp: same weights, same threads, one run.

    python bench/serve.py --model smollm2.gguf --name smollm2          # any model that `slm` opens
    python bench/serve.py --preset 25m --name 25m                      # a size of ours, with random weights
    python bench/serve.py --preset 25m --name 25m-avx2 --avx2          # as a processor without AVX-512 would

Every measurement runs in a process of its own, all of them in turn, `--rounds`
times; the best round counts, the others are kept in the record.
--avx2 holds PyTorch and oneDNN to AVX2; llama.cpp has no such switch and uses what the processor has.
Writes results/44_serve.batching/NAME/run.json.
"""
import argparse, http.client, json, os, subprocess, sys, tempfile, time
from pathlib import Path

ROOT = Path(__file__).parents[1]
TEXT = ('The old library stood at the end of the street, and nobody in the town could say who had built it. '
        'Its windows were tall and narrow, and in winter the snow lay on their ledges for weeks. '
        'Inside there were more books than a person could read in ten lives: on plants and stars, on bridges and clocks. ')*8

def ids_of(tok, n, shift=0): return (tok.encode(TEXT[shift:])*4)[:n]

def write(a, tmp):
    "The model in all forms"
    import torch
    from slm.core import set_seed
    from slm.data.tokenizer import train_bpe
    from slm.model.gpt import GPT, GPTConfig
    from slm.model.pretrained import load_model_and_tokenizer
    from slm.serve.export import export_gguf
    from pydoc_data.topics import topics
    if a.model: model, tok = load_model_and_tokenizer(a.model)
    else:
        set_seed(0); tok = train_bpe(['\n'.join(topics.values())], 6144)
        model = GPT(GPTConfig.preset(a.preset, tok.vocab_size, 2048)).eval()
    model.save_pretrained(tmp/'hf', tok)
    for k in ('f32', 'q8_0'): export_gguf(model, tok, tmp/f'{k}.gguf', k)
    return dict(parameters=model.num_params(), bytes={p.name: p.stat().st_size for p in tmp.glob('*.gguf')})

# ---- one measurement each, in its own process: prints a dict of figures

def hf(tmp, n, threads):
    import torch
    from transformers import AutoModelForCausalLM
    from slm.data.tokenizer import Tokenizer
    torch.set_num_threads(threads); torch.set_grad_enabled(False)
    tok, m = Tokenizer.load(tmp/'hf'), AutoModelForCausalLM.from_pretrained(tmp/'hf', dtype=torch.float32).eval()
    def run(b, k):
        t = time.perf_counter()
        m.generate(torch.tensor([ids_of(tok, 32)]*b), max_new_tokens=k, min_new_tokens=k, do_sample=False); return time.perf_counter()-t
    run(1, 4); run(8, 4)
    return dict(decode=(n-1)/(run(1, n)-run(1, 1)), batch8=8*n/run(8, n))

def streams(engine, requests, gap=0.):
    "Seconds from submission to the first token, and the times of all tokens, of requests submitted `gap` seconds apart"
    import threading
    done, log = threading.Semaphore(0), [[] for _ in requests]
    def note(i):
        def emit(p): log[i].append((time.perf_counter(), p.completion_tokens)); p.finish_reason and done.release()
        return emit
    starts = []
    for i,r in enumerate(requests): starts.append(time.perf_counter()); engine.submit(r, note(i)); time.sleep(gap)
    for _ in requests: done.acquire()
    return starts, log

def own(engine, n):
    "Figures of an engine with 8 slots; one that has a `run` works in the main thread, as in the server"
    from concurrent.futures import ThreadPoolExecutor
    if not hasattr(engine, 'run'): return ask(engine, n)
    with ThreadPoolExecutor(1) as ex: f = ex.submit(ask, engine, n); engine.run(); return f.result()

def ask(engine, n):
    "The figures, from the side of those who ask"
    from slm.serve.engine import Request
    if hasattr(engine, 'ends'): engine.ends = set()
    wish = lambda k, m=32, shift=0: Request(ids_of(engine.tok, m, shift), k, temperature=0)
    streams(engine, [wish(4, shift=9*i) for i in range(8)]); streams(engine, [wish(4, 256, 7)])
    try: return figures(engine, n, wish)
    finally: engine.close()

def figures(engine, n, wish):
    res = {}
    _, (log,) = streams(engine, [wish(n)]); made = log[-1][1]
    res['decode'] = (made-1)/(log[-1][0]-log[0][0])
    starts, logs = streams(engine, [wish(n, shift=9*i) for i in range(8)])
    res['batch8'] = sum(l[-1][1] for l in logs)/(max(l[-1][0] for l in logs)-starts[0])
    first = []
    for i in range(8): s, l = streams(engine, [wish(2, 256, 11*i+1)]); first.append(l[0][0][0]-s[0])
    res['ttft'] = sorted(first)[len(first)//2]
    late = []
    for i in range(8): s, l = streams(engine, [wish(40, 256, 40*i+9*j+3) for j in range(4)], .1); late += [b[0][0]-a for a,b in zip(s, l)]
    res['ttft_p95'] = sorted(late)[int(.95*len(late))]
    return res

def torch_engine(tmp, n, threads, int8=False, compiled=True):
    from slm.serve.batching import open_torch_engine
    return own(open_torch_engine(tmp/'hf', 8, 1024, threads, int8, 'cpu', own_thread=False, compiled=compiled), n)

def gguf_engine(tmp, n, threads, kind):
    from slm.serve.engine import GGUFEngine
    return own(GGUFEngine(tmp/f'{kind}.gguf', 8, 1024, threads), n)

def llama(tmp, n, threads, kind):
    "llama.cpp itself, called without our engine"
    import xllamacpp
    from slm.data.tokenizer import Tokenizer
    p = xllamacpp.CommonParams()
    p.model.path, p.n_ctx, p.n_parallel, p.verbosity = str(tmp/f'{kind}.gguf'), 1024, 1, -1
    p.cpuparams.n_threads = p.cpuparams_batch.n_threads = threads
    s, ids = xllamacpp.Server(p), ids_of(Tokenizer.load(tmp/'hf'), 32)
    run = lambda k: s.handle_completions(dict(prompt=ids, n_predict=k, temperature=0, ignore_eos=True,
                                              stream=False))['timings']['predicted_per_second']
    run(4)
    return dict(decode=max(run(n) for _ in range(2)))

def through_http(tmp, n, threads, kind):
    "The gguf engine behind `slm serve`: whole answers, and streams"
    from slm.data.tokenizer import Tokenizer
    ids, slm = ids_of(Tokenizer.load(tmp/'hf'), 32), Path(sys.executable).with_name('slm')
    with subprocess.Popen([slm, 'serve', tmp/f'{kind}.gguf', '--engine', 'gguf', '--port', '0', '--slots', '1', '--threads', str(threads)],
                          stdout=subprocess.PIPE, text=True) as proc:
        c = http.client.HTTPConnection(proc.stdout.readline().split('http://')[1].split()[0])
        def ask(k, stream=False):
            t = time.perf_counter()
            c.request('POST', '/v1/completions', json.dumps(dict(model=kind, prompt=ids, max_tokens=k, temperature=0, stream=stream)),
                      {'Content-Type': 'application/json'})
            body = c.getresponse().read(); secs = time.perf_counter()-t
            if not stream and (made := json.loads(body)['usage']['completion_tokens']) != k: sys.exit(f'{made} tokens instead of {k}')
            return secs
        def ready(): c.request('GET', '/readyz'); r = c.getresponse(); r.read(); return r.status == 200
        try:
            while not ready(): time.sleep(.1)
            ask(8)
            best = lambda k, stream: min(ask(k, stream) for _ in range(4))
            # what each connection waits for falls out
            return {name: (n-n//2)/(best(n, stream)-best(n//2, stream)) for name,stream in (('decode', False), ('streamed', True))}
        finally: proc.terminate()

WHAT = {'transformers': lambda *a: hf(*a), 'torch': lambda *a: torch_engine(*a), 'torch eager': lambda *a: torch_engine(*a, compiled=False),
        'torch int8': lambda *a: torch_engine(*a, int8=True), 'torch int8 eager': lambda *a: torch_engine(*a, int8=True, compiled=False),
        'llama.cpp f32': lambda *a: llama(*a, 'f32'), 'llama.cpp q8_0': lambda *a: llama(*a, 'q8_0'),
        'gguf q8_0': lambda *a: gguf_engine(*a, 'q8_0'),
        'http q8_0': lambda *a: through_http(*a, 'q8_0')}

def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter); add = ap.add_argument
    add('--model')
    add('--preset', default='25m')
    add('--name', default='25m'); add('--tokens', type=int, default=128); add('--threads', type=int, default=2)
    add('--rounds', type=int, default=3)
    add('--avx2', action='store_true'); add('--one', help=argparse.SUPPRESS); add('--tmp', type=Path, help=argparse.SUPPRESS)
    a = ap.parse_args()
    if a.one: return print('\n'+json.dumps(WHAT[a.one](a.tmp, a.tokens, a.threads)))
    from slm.core import Metric, RunDir
    with tempfile.TemporaryDirectory() as tmp:
        run = RunDir.create(ROOT/'results'/'44_serve.batching'/a.name, 'bench',
                            dict(model=a.name, tokens=a.tokens, threads=a.threads, rounds=a.rounds, avx2=a.avx2), seed=0, exist_ok=True)
        env = dict(os.environ,
                   OMP_NUM_THREADS=str(a.threads)) | (dict(ATEN_CPU_CAPABILITY='avx2', ONEDNN_MAX_CPU_ISA='AVX2') if a.avx2 else {})
        info, got = write(a, Path(tmp)), {k: [] for k in WHAT}
        for _ in range(a.rounds):
            for k in WHAT:
                p = subprocess.run([sys.executable, '-W', 'ignore', __file__, '--one', k, '--tmp', tmp, '--tokens', str(a.tokens),
                                    '--threads', str(a.threads)], env=env, capture_output=True, text=True)
                if p.returncode: sys.exit(f'{k}: {p.stderr[-2000:]}')
                got[k].append(json.loads(p.stdout.strip().splitlines()[-1]))
                print(k, {m: round(v, 3) for m,v in got[k][-1].items()}, flush=True)
        run.info |= info | dict(rounds=got)
        for k,rs in got.items():
            for m in rs[0]:
                slow = m.startswith('ttft'); v = [r[m] for r in rs]
                run.add_metrics(**{f'{k} {m}'.replace(' ', '_'): Metric((min if slow else max)(v), min(v), max(v), len(v),
                                                                        's' if slow else 'tokens/s')})
    run.finish()
    m = lambda k: run.metric(k).value
    for a_,b in (('torch_decode', 'transformers_decode'), ('torch_eager_decode', 'transformers_decode'),
                 ('torch_decode', 'llama.cpp_f32_decode'), ('torch_int8_decode', 'llama.cpp_q8_0_decode'),
                 ('torch_batch8', 'transformers_batch8'), ('gguf_q8_0_decode', 'llama.cpp_q8_0_decode'),
                 ('http_q8_0_decode', 'llama.cpp_q8_0_decode')):
        print(f'{a_} / {b}: {m(a_)/m(b):.2f}')

if __name__ == '__main__': main()
