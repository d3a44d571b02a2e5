"""Tokenizer against peers: train a vocabulary on files, encode them, write token shards; seconds, MB/s and equality of ids.

    python bench/tokenizer.py --files 'texts/*.txt' --vocab 4096 8192 --out results/bench/tokenizer.json

Peers read the vocabulary that we trained: `tokenizers` called directly, and `tiktoken` (if installed) with our merges as ranks.
The best of --repeat is reported; the ids of all must be equal, or the benchmark fails.
"""
import argparse, glob, json, sys, tempfile, time
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from slm.core import hardware, write_json
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

def best(f, n):
    "Smallest time of n calls, and the last result"
    ts = []
    for _ in range(n): t0 = time.perf_counter(); res = f(); ts.append(time.perf_counter()-t0)
    return min(ts), res

def tiktoken_encoding(tok):
    import tiktoken
    ranks = {b: i-len(SPECIALS) for i,b in enumerate(tok.id_bytes) if i >= len(SPECIALS)}
    return tiktoken.Encoding('ours', pat_str=GPT2, mergeable_ranks=ranks, special_tokens={})

def measure(docs, mb, vocab, repeat, threads):
    train_s, tok = best(lambda: train_bpe(docs, vocab), 1)
    encode_s, ids = best(lambda: tok.encode_batch(docs), repeat)
    corpus = SimpleNamespace(name='bench', fingerprint='0'*16, license='', docs=lambda split: iter(docs if split=='train' else docs[:1]))
    with tempfile.TemporaryDirectory() as d: shards_s, data = best(lambda: tokenize(corpus, tok, Path(d)/'tokens'), 1)
    n = sum(map(len, ids)); assert data.train.n_tokens == n+len(docs)
    res = dict(vocab=vocab, tokens=n, bytes_per_token=round(mb*1e6/n, 3), train_s=round(train_s, 2), encode_s=round(encode_s, 2), shards_s=round(shards_s, 2),
               train_and_shards_s=round(train_s+shards_s, 2), encode_mb_s=round(mb/encode_s, 1), peers={})
    s, theirs = best(lambda: [e.ids for e in tok.tok.encode_batch(docs, add_special_tokens=False)], repeat)
    res['peers']['tokenizers.encode_batch'] = dict(encode_s=round(s, 2), mb_s=round(mb/s, 1), equal_ids=theirs==ids)
    try: enc = tiktoken_encoding(tok)
    except ImportError: return res
    s, theirs = best(lambda: enc.encode_ordinary_batch(docs, num_threads=threads), repeat)
    theirs = [[i+len(SPECIALS) for i in t] for t in theirs]
    res['peers']['tiktoken'] = dict(encode_s=round(s, 2), mb_s=round(mb/s, 1), equal_ids=theirs==ids)
    return res

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--files', required=True, help='glob of UTF-8 text files')
    p.add_argument('--vocab', type=int, nargs='+', default=[4096, 8192])
    p.add_argument('--repeat', type=int, default=2)
    p.add_argument('--out', help='write the JSON here, too')
    a = p.parse_args()
    docs = list(documents(a.files))
    if not docs: sys.exit(f"no text in '{a.files}'")
    mb, hw = sum(len(d.encode()) for d in docs)/1e6, hardware()
    res = dict(bench='tokenizer', mb=round(mb, 2), documents=len(docs), hardware=hw,
               versions={k: metadata.version(k) for k in ('tokenizers', 'tiktoken') if k in {d.name for d in metadata.distributions()}},
               results=[measure(docs, mb, v, a.repeat, hw['cores']) for v in a.vocab])
    print(json.dumps(res, indent=1))
    if a.out: write_json(a.out, res)
    bad = [f"{n} at {r['vocab']}" for r in res['results'] for n,x in r['peers'].items() if not x['equal_ids']]
    if bad: sys.exit(f'ids differ from {bad}')

if __name__ == '__main__': main()
