"""Tokenizer against peers: train a vocabulary on files, encode them, write token shards; seconds, MB/s and equality of ids.

    python bench/tokenizer.py --files 'texts/*.txt' [--vocab 4096 8192] [--repeat 3] [--out DIR]

Peers read the vocabulary that we trained: `tokenizers` called directly, and `tiktoken` (if installed) with our
merges as its ranks. They take turns; the best of --repeat counts. The ids of all must be equal, or the benchmark
fails. Prints JSON and writes DIR/run.json.
"""
import argparse, glob, json, sys, tempfile, time
from pathlib import Path
from types import SimpleNamespace
from slm.core import Metric, RunDir
from slm.data.loaders import tokenize
from slm.data.tokenizer import SPECIALS, train_bpe

GPT2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"

def documents(pattern):
    "Paragraphs joined to documents of at least 2,000 characters"
    for f in sorted(glob.glob(pattern)):
        doc = ''
        for p in Path(f).read_text(encoding='utf-8').split('\n\n'):
            doc += p+'\n\n'
            if len(doc) >= 2000: yield doc; doc = ''
        if doc: yield doc

def timed(f): t0 = time.perf_counter(); res = f(); return time.perf_counter()-t0, res

def peers(tok, docs):
    "name -> function that encodes all documents to our ids"
    res = dict(slm=lambda: tok.encode_batch(docs), tokenizers=lambda: [e.ids for e in tok.tok.encode_batch(docs, add_special_tokens=False)])
    try: import tiktoken
    except ImportError: return res
    n = len(SPECIALS); ranks = {b: i-n for i,b in enumerate(tok.id_bytes) if i >= n}
    enc = tiktoken.Encoding('ours', pat_str=GPT2, mergeable_ranks=ranks, special_tokens={})
    return res | dict(tiktoken=lambda: [[i+n for i in d] for d in enc.encode_ordinary_batch(docs)])

def measure(run, docs, mb, vocab, repeat):
    "Record one vocabulary size's figures in `run`; returns the peers whose ids differ from ours"
    train_s, tok = timed(lambda: train_bpe(docs, vocab))
    corpus = SimpleNamespace(name='bench', fingerprint='0'*16, license='', docs=lambda split: iter(docs if split=='train' else docs[:1]))
    with tempfile.TemporaryDirectory() as d: shards_s, data = timed(lambda: tokenize(corpus, tok, Path(d)/'tokens'))
    who = peers(tok, docs); secs, ids = {k: [] for k in who}, {}
    for _ in range(repeat):
        for k,f in who.items(): s, ids[k] = timed(f); secs[k].append(s)
    n = sum(map(len, ids['slm'])); assert data.train.n_tokens == n+len(docs)
    s = lambda x: Metric(round(x, 3), unit='s')
    run.add_metrics(**{f'{vocab}_bytes_per_token': Metric(mb*1e6/n, unit='bytes'), f'{vocab}_train': s(train_s),
                       f'{vocab}_shards': s(shards_s),
                       f'{vocab}_train_and_shards': s(train_s+shards_s), **{f'{vocab}_encode_{k}': s(min(v)) for k,v in secs.items()},
                       **{f'{vocab}_same_ids_{k}': Metric(float(v==ids['slm'])) for k,v in ids.items()}})
    return [f'{k} at {vocab}' for k,v in ids.items() if v != ids['slm']]

def main():
    p = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    p.add_argument('--files', required=True, help='glob of UTF-8 text files')
    p.add_argument('--vocab', type=int, nargs='+', default=[4096, 8192]); p.add_argument('--repeat', type=int, default=3)
    p.add_argument('--out', type=Path, default=Path(__file__).parents[1]/'results'/'04_data.tokenizer'/'bench')
    a = p.parse_args()
    docs = list(documents(a.files))
    if not docs: sys.exit(f"no text in '{a.files}'")
    mb = sum(len(d.encode()) for d in docs)/1e6
    run = RunDir.create(a.out, 'bench', config=dict(mb=round(mb, 2), documents=len(docs), repeat=a.repeat), exist_ok=True)
    bad = [b for v in a.vocab for b in measure(run, docs, mb, v, a.repeat)]
    run.finish('failed' if bad else 'done'); print(json.dumps({k: m['value'] for k,m in run.info['metrics'].items()}, indent=1))
    if bad: sys.exit(f'ids differ: {bad}')

if __name__ == '__main__': main()
