"Words spelled in pieces: cuts of anything, means by hand, twins, and what gensim's FastText knows."
import numpy as np, pytest
from collections import Counter
from hypothesis import given, settings, strategies as st
from slm.core import SLMError
from slm.data.tokenizer import train_bpe
from slm.data.world import World
from slm.exp.tok2vec import CUTS, Pieces, spelling_overlap, token_vectors, untrained
from slm.model.vectors import PieceVectors, split_words, train_vectors

TEXT = [p for s in World().stories(1, 300) for p in split_words(s.text)]
WORDS = [w for w,_ in Counter(w for p in TEXT for w in p).most_common()]
TOK = train_bpe((' '.join(p) for p in TEXT), 500)
FEW = dict(d=16, epochs=1, threads=1, min_count=2)

@given(st.lists(st.text(st.characters(codec='utf-8'), min_size=1, max_size=8), max_size=5), st.sampled_from(CUTS))
@settings(deadline=None, max_examples=80)
def test_any_words_are_cut(words, how):
    c = Pieces(how, WORDS, TOK, buckets=500); starts,ids = c(words); assert len(starts) == len(words)+1 and starts[-1] == len(ids)
    assert ((0 <= ids) & (ids < c.n)).all() if len(ids) else True
    p = np.random.default_rng(0).standard_normal((c.n, 4)).astype(np.float32); v = PieceVectors([], p[:0], pieces=p, cut=c).spell(words)
    assert len(v) == sum(np.diff(starts) > 0) and np.isfinite(v.vectors).all()
    for w,x in zip(v.words, v.vectors): assert np.allclose(x, p[c.ids(w)].mean(0), atol=1e-5)

def test_pieces_of_one_word_each_are_word2vec():
    "The same loop as skip-gram by pairs but for who tells whom: as good on the text it was trained on"
    from slm.model.vectors import pair_loss
    a,b = (train_vectors(TEXT, **kw, **FEW | dict(epochs=4)) for kw in (dict(kind='pairs'), dict(pieces=Pieces('words', WORDS))))
    assert a.words == b.words and abs(pair_loss(a, TEXT).value-pair_loss(b, TEXT).value) < .08

def test_one_thread_repeats_itself_and_settings_are_checked():
    a,b = (train_vectors(TEXT, pieces=Pieces('tokens', [], TOK), seed=3, **FEW) for _ in range(2)); assert (a.pieces == b.pieces).all()
    with pytest.raises(SLMError, match='does not go with pieces'): train_vectors(TEXT, kind='cbow', pieces=Pieces('tokens', [], TOK), **FEW)
    with pytest.raises(SLMError, match='unknown cut'): Pieces('letters', WORDS)

def test_summed_tokens_are_means_of_token_vectors():
    v = token_vectors(lambda: TEXT, WORDS[:50], TOK, d=16, epochs=1, threads=1); w = max(WORDS[:50], key=len); i = TOK.encode(' '+w)
    assert np.allclose(v[w], v.pieces[i].mean(0), atol=1e-6)
    s = token_vectors(lambda: TEXT, WORDS[:50], TOK, sif=1e-3, d=16, epochs=1, threads=1)
    n = Counter(i for p in TEXT for w in p for i in TOK.encode(' '+w))
    share = np.array([n[j]/sum(n.values()) for j in i])
    assert np.allclose(s[w], np.average(s.pieces[i], 0, weights=1e-3/(1e-3+share)), atol=1e-5)

def test_a_twin_knows_spelling_and_nothing_else():
    v = train_vectors(TEXT, pieces=Pieces('ngrams', WORDS, buckets=5000), **FEW); u = untrained(v, d=64)
    pairs = [(a, b) for a in WORDS[:150] for b in WORDS[:150] if a < b]; alike = np.array([spelling_overlap(a, b) for a,b in pairs])
    cos = np.array([u.unit[u.at[a]]@u.unit[u.at[b]] for a,b in pairs if a in u and b in u])
    assert cos[alike > .3].mean() > .3 and abs(cos[alike == 0].mean()) < .02
    w = untrained(train_vectors(TEXT, pieces=Pieces('words', WORDS), **FEW), d=64); cos = w.unit@w.unit.T
    assert np.abs(cos[~np.eye(len(w), dtype=bool)]).mean() < .15                 # random vectors: nothing

def test_a_word_without_a_piece_is_named():
    with pytest.raises(SLMError, match='no piece for'): train_vectors(TEXT, pieces=Pieces('words', WORDS[1:]), **FEW)
    twice = Pieces('words', [WORDS[0], *WORDS]); assert twice.n == len(WORDS) and max(twice.ids(w)[0] for w in WORDS) == twice.n-1
    class Wrong(Pieces):
        def ids(self, word): return [self.n]
    with pytest.raises(SLMError, match='numbered 0 to'): train_vectors(TEXT, pieces=Wrong('words', WORDS), **FEW)
    with pytest.raises(SLMError, match='buckets'): Pieces('ngrams', WORDS, buckets=0)
