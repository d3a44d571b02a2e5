"""Words as one vector, as runs of letters, as tokens: what each has learned, beside a twin that has learned nothing.

    python bench/tok2vec.py FILE... [--seeds 3] [--threads 2] [--wide] [--rare rareword.txt] [--twins 800] [--name prose]

The same paragraphs for all, 100 numbers, windows of 5, 5 negatives, 5 epochs, sample 1e-3, min_count 5. Mikolov's questions (the semantic
and the syntactic ones, and those by how alike c and d are spelled), WordSim-353 and SimLex-999 (which gensim ships), and RareWord if it
is given. A twin has the same words and pieces and random vectors. --wide: 4k tokens with as many numbers for tokens as the words have.
Writes results/58_exp.tok2vec/NAME/run.json.
"""
import argparse, time
from pathlib import Path
import gensim, numpy as np
from common import median
from gensim.models import FastText
from slm.core import Metric, RunDir
from slm.data.corpus import whole_text
from slm.data.tokenizer import train_bpe
from slm.exp.tok2vec import Pieces, spelling_overlap, token_vectors, untrained
from slm.exp.word2vec import read_judged, similarity_correlation
from slm.model.vectors import PieceVectors, WordVectors, read_analogies, split_words, train_vectors

ROOT = Path(__file__).parents[1]
DATA = Path(gensim.__file__).parent/'test'/'test_data'

def only_twins(run, cuts, words, d, look): # what spelling alone can say, where there is room for it
    for k,c in cuts.items():
        v = untrained(PieceVectors(words, np.zeros((len(words), 1)), pieces=None, cut=c), 0, d); got = look(v); print(k, got, flush=True)
        run.add_metrics(**{f'{k}|{m}': Metric(float(x)) for m,x in got.items()})
    run.finish()

def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter); add = ap.add_argument
    add('files', nargs='+'); add('--seeds', type=int, default=3); add('--threads', type=int, default=2); add('--wide', action='store_true')
    add('--rare', type=Path); add('--twins', type=int, help='only the twins, with so many numbers'); add('--name', default='prose')
    a = ap.parse_args()
    text = [p for f in a.files for p in split_words(whole_text(f))]; np.random.default_rng(0).shuffle(text)
    toks = {k: train_bpe((' '.join(p) for p in text), v) for k,v in {'1k': 1024, '4k': 4096, '16k': 16384}.items()}
    o = dict(threads=a.threads); words = train_vectors(text, epochs=1, d=4, **o).words
    known = set(words)
    asked = [(kind, q) for kind,qs in read_analogies(DATA/'questions-words.txt').items() for q in qs if known.issuperset(q)]
    questions,grammar = [q for _,q in asked],np.array([kind.startswith('gram') for kind,_ in asked])
    alike = np.array([spelling_overlap(c, d) for _,_,c,d in questions])
    sets = dict(semantic=~grammar, syntactic=grammar, all=grammar >= 0)
    sets |= dict(apart=alike == 0, some=(alike > 0) & (alike < .5), alike=alike >= .5)
    judged = {n: read_judged(DATA/f) for n,f in dict(wordsim='wordsim353.tsv', simlex='simlex999.txt').items()}
    if a.rare: judged['rare'] = read_judged(a.rare)
    config = dict(files=[Path(f).name for f in a.files], words=sum(map(len, text)), vocabulary=len(words), seeds=a.seeds, threads=a.threads,
                  questions={k: int(m.sum()) for k,m in sets.items()}, gensim=gensim.__version__)
    run = RunDir.create(ROOT/'results'/'58_exp.tok2vec'/a.name, 'bench', config, exist_ok=True)
    cuts = {k: Pieces(k, words) for k in ('words', 'ngrams')} | {f'tokens-{k}': Pieces('tokens', words, t) for k,t in toks.items()}
    cuts['tokens+word-4k'] = Pieces('tokens+word', words, toks['4k'])
    if a.twins: return only_twins(run, cuts, words, a.twins, lambda v: {k: v.solve(questions)[m].mean() for k,m in sets.items()})
    make = {k: lambda s, c=c: train_vectors(text, pieces=c, seed=s, **o) for k,c in cuts.items()}
    make['summed-4k'] = lambda s: token_vectors(lambda: text, words, toks['4k'], seed=s, **o)
    make['sif-4k'] = lambda s: token_vectors(lambda: text, words, toks['4k'], sif=1e-3, seed=s, **o)
    wide = round(100*len(words)/4096)
    if a.wide: make['tokens-4k-wide'] = lambda s: train_vectors(text, pieces=cuts['tokens-4k'], d=wide, seed=s, **o)
    def gensim_fasttext(s):
        m = FastText(text, vector_size=100, window=5, negative=5, epochs=5, sample=1e-3, min_count=5, sg=1, bucket=100_000,
                     workers=a.threads, seed=s+1)
        v = WordVectors(words, np.array([m.wv[w] for w in words])); v.spell = lambda ws: WordVectors(ws, np.array([m.wv[w] for w in ws]))
        return v
    make['gensim-fasttext'] = gensim_fasttext
    rare = [w for p in judged.get('rare', []) for w in p[:2] if w not in known]
    def look(v):
        right = v.solve(questions); res = {k: right[m].mean() for k,m in sets.items()}
        for n,rows in judged.items():
            if n != 'rare': res[n] = similarity_correlation(v, rows).value; continue
            more = v.spell(list(dict.fromkeys(rare))) if hasattr(v, 'spell') else None                       # words that the text has not
            full = WordVectors([*v.words, *more.words], np.concatenate([v.vectors, more.vectors])) if more and len(more) else v
            r = similarity_correlation(full, rows); res |= {n: r.value, 'rare_pairs': r.n}
        return res
    got = {}
    for seed in range(a.seeds):
        for k,f in make.items():
            t0 = time.perf_counter(); v = f(seed); secs = time.perf_counter()-t0; res = look(v) | dict(seconds=secs)
            got.setdefault(k, []).append(res)
            if hasattr(v, 'cut') and k not in ('summed-4k', 'sif-4k'): got.setdefault(f'{k}:untrained', []).append(look(untrained(v, seed)))
            print(seed, k, {m: round(float(x), 3) for m,x in res.items()}, flush=True)
    for k,rows in got.items():
        for m in rows[0]: run.add_metrics(**{f'{k}|{m}': median(np.array([r[m] for r in rows], float), '')})
    for k in make: # what was learned
        twin = got.get(f"{'tokens-4k' if k in ('summed-4k', 'sif-4k') else 'ngrams' if k == 'gensim-fasttext' else k}:untrained")
        for m in ({*got[k][0]} & {*twin[0]})-{'rare_pairs', 'seconds'}:
            run.add_metrics(**{f'{k}|{m}|learned': median(np.array([r[m]-u[m] for r,u in zip(got[k], twin)]), '')})
    run.finish()
    for k,v in run.info['metrics'].items(): print(f'{k:36} {Metric(**v)}')

if __name__ == '__main__': main()
