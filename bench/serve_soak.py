"""The HTTP server under people as they are: sixteen at once, some of whom leave in the middle, send nonsense, or ask for too much.

    python bench/serve_soak.py MODEL.gguf [--minutes 10] [--clients 16] [--slots 4] [--threads N]

Starts a server of its own, measures first what HTTP adds to a streamed token (the same text through the server and
straight from an engine in this process, in turns, medians over the repeats, one core left to HTTP), then lets the
clients loose, and ends the server with SIGTERM while they go on. Says how many requests there were of each kind and
how they were answered, and how the memory of the server grew from the first fifth of the time to the last. Exits
with 1 when a request got an answer that it should not have. Writes results/46_serve.api/soak/run.json.
"""
import argparse, asyncio, contextlib, http.client, json, os, random, signal, subprocess, sys, time
from collections import Counter
from pathlib import Path
import httpx, numpy as np, psutil
from slm.core import Metric, RunDir
from slm.serve.engine import GGUFEngine, Request, pieces, usable_cpus

SERVER = '''import json, sys
from slm.serve.engine import GGUFEngine
from slm.serve.api import create_app, serve
from slm.serve.gate import Settings
model, slots, threads, queue = sys.argv[1], *map(int, sys.argv[2:])
e = GGUFEngine(model, slots=slots, threads=threads)
serve(create_app({'model': e}, Settings(queue=queue, max_tokens=1024, timeout=120)), port=0, say=lambda s: print(s, flush=True))
e.close()
assert 'torch' not in sys.modules
'''
GONE = (httpx.ReadError, httpx.WriteError, httpx.RemoteProtocolError)
WORDS = 'Where is the kite ? Tell me about Ann and Ben who went to the market with an old lamp and a red book'.split()

def median(x, unit):
    x = np.asarray(x); draws = np.median(np.random.default_rng(0).choice(x, (1000, len(x))), axis=1)
    return Metric(float(np.median(x)), *map(float, np.percentile(draws, [2.5, 97.5])), n=len(x), unit=unit)

# ---- what HTTP adds to a token

def through_http(port, ids, n):
    c = http.client.HTTPConnection('127.0.0.1', port); t0 = time.perf_counter()
    c.request('POST', '/v1/completions',
              json.dumps(dict(model='model', prompt=ids, max_tokens=n, temperature=0, stream=True,
                              stream_options=dict(include_usage=True))), {'Content-Type': 'application/json'})
    r, last = c.getresponse(), b''
    for l in r:
        if l.startswith(b'data: {'): last = l
    secs = time.perf_counter()-t0; c.close(); return secs, json.loads(last[6:])['usage']['completion_tokens']

def straight(engine, ids, n):
    t0 = time.perf_counter(); made = [p.completion_tokens for p in pieces(engine, Request(ids, max_new_tokens=n, temperature=0))][-1]
    return time.perf_counter()-t0, made

@contextlib.contextmanager
def server(a, threads):
    "A server in a process of its own; gives the process and its address"
    env = os.environ | dict(PYTHONPATH=os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get('PYTHONPATH', '')]))
    with subprocess.Popen([sys.executable, '-c', SERVER, a.model, *map(str, (a.slots, threads, a.queue))], stdout=subprocess.PIPE,
                          text=True, env=env) as proc:
        try:
            url = proc.stdout.readline().split()[-1]
            while httpx.get(f'{url}/readyz').status_code != 200: time.sleep(.05)
            yield proc, url
        finally: proc.terminate() if proc.poll() is None else None

def cost(port, a, threads):
    "Milliseconds that HTTP adds to each token, and those of the engine, once for each repeat"
    engine, n, extra, per = GGUFEngine(a.model, slots=a.slots, threads=threads), 600, [], []
    # one that does not end by itself
    ids = next(i for p in ('1 2 3 4 5 6', 'Once upon a time', 'a', 'The kite') if straight(engine, i := engine.tok.encode(p), n)[1] == n)
    through_http(port, ids, n)                                                           # the warm-up
    for _ in range(a.repeats):
        (th, nh), (ts, ns) = through_http(port, ids, n), straight(engine, ids, n); assert nh == ns == n, (nh, ns)
        extra.append(1000*(th-ts)/n); per.append(1000*ts/n)
    engine.close(); return extra, per

# ---- the crowd

def chat(rng, **kw):
    return dict(model='model', messages=[dict(role='user', content=' '.join(rng.choices(WORDS, k=rng.randint(3, 60))))],
                max_tokens=rng.randint(1, 60)) | kw

class Crowd:
    "What the clients did, and what they got"
    def __init__(self, url): self.url, self.count, self.wrong, self.leaving, self.first = url, Counter(), [], False, []
    def note(self, kind, status, ok):
        self.count[kind, status] += 1
        if not ok and not (self.leaving and status in (503, 'refused', 'closed')): self.wrong.append((kind, status))

    async def stream(self, c, rng, leave):
        t0, got, done = time.perf_counter(), 0, False
        async with c.stream('POST', f'{self.url}/v1/chat/completions', json=chat(rng, stream=True)) as s:
            if s.status_code != 200: return self.note('stream', s.status_code, s.status_code == 429 and 'retry-after' in s.headers)
            stop = rng.randint(0, 20) if leave else None
            try:
                async for l in s.aiter_lines():
                    if l.startswith('data: {'):
                        d = json.loads(l[6:]); got += 1
                        if got == 1: self.first.append(time.perf_counter()-t0)
                        if 'error' in d: return self.note('stream', 'error event', False)
                    done |= l == 'data: [DONE]'
                    if stop is not None and got > stop: return self.note('leaves', 200, True)
            except GONE: pass
        self.note('stream', 200 if done else 'cut off', done)

    async def plain(self, c, rng):
        r = await c.post(f'{self.url}/v1/chat/completions', json=chat(rng))
        ok = r.status_code == 200 and r.json()['choices'][0]['finish_reason'] in ('stop', 'length')
        self.note('plain', r.status_code, ok or r.status_code == 429)

    async def gone(self, c, rng):
        try:
            r = await c.post(f'{self.url}/v1/chat/completions', json=chat(rng, max_tokens=500), timeout=rng.random())
            self.note('hangs up', r.status_code, r.status_code in (200, 429))
        except httpx.TimeoutException: self.note('hangs up', 'left', True)

    async def bad(self, c, rng):
        long = [dict(role='user', content='word '*9000)]
        bad = [(chat(rng, temperature=9), 422), (chat(rng, tools=[1]), 422), (chat(rng, model='x'), 404), (chat(rng, messages=long), 400),
               (chat(rng, max_tokens=10**6), 400)]
        body, want = rng.choice([*((json.dumps(b).encode(), w) for b,w in bad), (b'{', 400), (b'x'*2**21, 413), (os.urandom(300), 400)])
        r = await c.post(f'{self.url}/v1/chat/completions', content=body, headers={'Content-Type': 'application/json'})
        self.note('nonsense', r.status_code, r.status_code in (want, 429))

    async def client(self, seed, until):
        rng = random.Random(seed)
        async with httpx.AsyncClient(timeout=150) as c:
            while time.monotonic() < until() and not self.over:
                x = rng.random()
                try:
                    if x < .4: await self.stream(c, rng, False)
                    elif x < .55: await self.stream(c, rng, True)
                    elif x < .75: await self.plain(c, rng)
                    elif x < .85: await self.gone(c, rng)
                    else: await self.bad(c, rng)
                except (httpx.ConnectError, *GONE) as e:
                    self.note('connection', 'refused' if isinstance(e, httpx.ConnectError) else 'closed', False)
                    if self.leaving: return
                await asyncio.sleep(rng.random()*.2)

    async def run(self, a, proc):
        self.over, t0, rss = False, time.monotonic(), []; end = t0+60*a.minutes
        jobs = [asyncio.create_task(self.client(i, lambda: end+30)) for i in range(a.clients)]; ps = psutil.Process(proc.pid)
        while time.monotonic() < end: await asyncio.sleep(1); rss.append(ps.memory_info().rss/2**20)
        self.leaving = True; proc.send_signal(signal.SIGTERM); t1 = time.monotonic()
        while proc.poll() is None and time.monotonic() < t1+150: await asyncio.sleep(.05)
        drained = time.monotonic()-t1; self.over = True; await asyncio.gather(*jobs); return rss, drained

def main():
    ap = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    ap.add_argument('model', type=Path, help='a .gguf file')
    ap.add_argument('--minutes', type=float, default=10); ap.add_argument('--clients', type=int, default=16)
    ap.add_argument('--slots', type=int, default=4)
    ap.add_argument('--queue', type=int, default=8)
    ap.add_argument('--threads', type=int, default=usable_cpus()); ap.add_argument('--repeats', type=int, default=15)
    ap.add_argument('--out', type=Path, default=Path(__file__).parents[1]/'results'/'46_serve.api'/'soak')
    a = ap.parse_args(); signal.signal(signal.SIGTERM, lambda *_: sys.exit('ended'))                # so that the server ends too
    asked = {k: v for k,v in vars(a).items() if k not in ('out', 'model')}
    run = RunDir.create(a.out, 'bench', asked | dict(model=a.model.stem, bytes=a.model.stat().st_size), seed=0, exist_ok=True)
    # the server and its client are programs too: a core for them
    spare = max(1, a.threads-1)
    with server(a, spare) as (_, url): extra, per = cost(int(url.rsplit(':')[-1]), a, spare)
    with server(a, a.threads) as (proc, url): crowd = Crowd(url); rss, drained = asyncio.run(crowd.run(a, proc))
    fifth = max(1, len(rss)//5); early, late = np.mean(rss[:fifth]), np.mean(rss[-fifth:])
    figures = {'HTTP per streamed token': median(extra, 'ms'), 'engine per token': median(per, 'ms'),
               'requests': Metric(sum(crowd.count.values()), unit='requests'),
               'answered as they should be': Metric(100*(1-len(crowd.wrong)/sum(crowd.count.values())), unit='%'),
               'time to first token, 95th percentile': Metric(float(np.percentile(crowd.first, 95)), n=len(crowd.first), unit='s'),
               'memory, last fifth': Metric(float(late), unit='MiB'), 'memory, most': Metric(float(max(rss)), unit='MiB'),
               'memory growth since the first fifth': Metric(float(100*(late/early-1)), unit='%'),
               'SIGTERM to the end': Metric(drained, unit='s'), 'exit status': Metric(proc.returncode)}
    run.info['memory_mib'] = [round(m, 1) for m in rss[::10]]                             # every ten seconds
    run.add_metrics(**figures)
    run.info['answers'] = {f'{k} {s}': n for (k,s),n in sorted(crowd.count.items(), key=str)}
    run.info['wrong'] = sorted({f'{k} {s}' for k,s in crowd.wrong})
    run.finish()
    print(json.dumps(dict(metrics={k: str(m) for k,m in figures.items()}, answers=run.info['answers'], wrong=run.info['wrong']), indent=1))
    sys.exit(bool(crowd.wrong) or proc.returncode)

if __name__ == '__main__': main()
