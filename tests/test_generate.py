"Generation: parity with transformers, invariance to cache, batch and token borders, faults."
import math
import pytest, torch
from hypothesis import given, settings, strategies as st
from slm.core import SLMError, set_seed
from slm.data.tokenizer import train_bpe
from slm.model.generate import *
from slm.model.generate import Sampler, TextStream, Stream
from slm.model.gpt import GPT, GPTConfig

V = 97

@pytest.fixture(scope='module')
def model():
    "Random weights, scaled up so that the distributions are far from flat and ties do not occur"
    set_seed(0)
    m = GPT(GPTConfig(vocab_size=V, n_layer=2, n_head=4, n_kv_head=2, d_model=32, d_ff=64, head_dim=8, max_seq_len=64)).eval()
    with torch.no_grad():
        for p in m.parameters():
            if p.ndim > 1: p.normal_(0, .4)
    return m

@pytest.fixture(scope='module')
def tok(): return train_bpe(['the cat sat on the mat and the dog ate the fat cat. Snow ❄ é 🙂 '*20], 290)

@pytest.fixture(scope='module')
def talker(tok):
    set_seed(1)
    m = GPT(GPTConfig(vocab_size=tok.vocab_size, n_layer=2, n_head=4, n_kv_head=2, d_model=32, d_ff=64, head_dim=8, max_seq_len=64)).eval()
    with torch.no_grad():
        for p in m.parameters():
            if p.ndim > 1: p.normal_(0, .4)
    return m

def rand_prompts(lens, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.randint(V, (n,), generator=g).tolist() for n in lens]

@torch.no_grad()
def uncached(model, prompt, params):
    "The definition: run everything again for every token, filter, draw"
    s, ids = Sampler([params]), list(prompt)
    for _ in range(params.max_new_tokens):
        seen = torch.zeros(1, model.cfg.vocab_size, dtype=torch.bool); seen[0, ids] = True
        ids.append(s(model(torch.tensor([ids]))[:, -1].float(), seen).item())
    return ids[len(prompt):]

MIXED = [dict(temperature=0), dict(temperature=.7, seed=1), dict(top_k=5, seed=2), dict(top_p=.8, seed=3),
         dict(min_p=.1, temperature=1.4, seed=4),
         dict(temperature=0, repetition_penalty=1.5), dict(temperature=.9, top_k=20, top_p=.9, min_p=.02, repetition_penalty=1.2, seed=5)]

# --- filters against transformers -----------------------------------------------------------------------------------------

def hf_filtered(logits, ids, p):
    "The list of processors that transformers' own `generate` builds, so its order is the order"
    from transformers import GenerationConfig, GPT2Config, GPT2LMHeadModel
    from transformers.generation.logits_process import LogitsProcessorList
    hf = GPT2LMHeadModel(GPT2Config(vocab_size=logits.shape[-1], n_layer=1, n_head=1, n_embd=4, n_positions=8, bos_token_id=0,
                                    eos_token_id=0))
    cfg = GenerationConfig(do_sample=True, temperature=p.temperature, top_k=p.top_k, top_p=p.top_p, min_p=p.min_p or None,
                           repetition_penalty=p.repetition_penalty, bos_token_id=0, eos_token_id=None, pad_token_id=0)
    procs = hf._get_logits_processor(generation_config=cfg, input_ids_seq_length=ids.shape[1], encoder_input_ids=ids,
                                     logits_processor=LogitsProcessorList())
    return procs(ids, logits.clone()), [type(x).__name__ for x in procs]

@pytest.mark.parametrize('seed', range(8))
def test_filters_equal_transformers_and_its_order(seed):
    g = torch.Generator().manual_seed(seed)
    r = lambda lo, hi: lo + (hi-lo)*torch.rand((), generator=g).item()
    for v in (7, 500, 5000):
        logits = torch.randn(4, v, generator=g)*r(.5, 6)
        ids = torch.randint(v, (4, 9), generator=g); seen = torch.zeros(4, v, dtype=torch.bool).scatter(1, ids, True)
        p = SamplingParams(temperature=r(.2, 2), top_k=int(r(1, 80)), top_p=r(.05, .99), min_p=r(.01, .4), repetition_penalty=r(.7, 2))
        want, names = hf_filtered(logits, ids, p)
        assert names == ['RepetitionPenaltyLogitsProcessor', 'TemperatureLogitsWarper', 'TopKLogitsWarper', 'TopPLogitsWarper',
                         'MinPLogitsWarper']
        torch.testing.assert_close(Sampler([p]*4).filter(logits, seen), want, atol=1e-6, rtol=1e-6)

@pytest.mark.parametrize('over', [dict(temperature=.5), dict(top_k=7), dict(top_p=.6), dict(min_p=.2), dict(repetition_penalty=1.7)])
def test_each_filter_alone_equals_transformers(over):
    g = torch.Generator().manual_seed(0); logits = torch.randn(5, 300, generator=g)*3; ids = torch.randint(300, (5, 20), generator=g)
    p = SamplingParams(**over); want, names = hf_filtered(logits, ids, p)
    assert len(names) == 1
    got = Sampler([p]*5).filter(logits, torch.zeros(5, 300, dtype=torch.bool).scatter(1, ids, True))
    torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-6)
    assert not torch.equal(got, logits)

def test_a_row_is_filtered_as_if_it_were_alone():
    g = torch.Generator().manual_seed(3); ps = [SamplingParams(**d) for d in MIXED]
    logits = torch.randn(len(ps), 200, generator=g)*3; seen = torch.rand(len(ps), 200, generator=g) < .1
    together = Sampler(ps).filter(logits, seen)
    for i,p in enumerate(ps): torch.testing.assert_close(together[i:i+1], Sampler([p]).filter(logits[i:i+1], seen[i:i+1]), atol=0, rtol=0)

def test_draws_never_land_on_what_was_cut_even_at_the_ends_of_the_interval(monkeypatch):
    logits = torch.full((1, 6), -math.inf); logits[0, 2:4] = 0.
    for u in (0., .25, .5-2**-53, .5, 1-2**-53):
        monkeypatch.setattr(torch, 'rand', lambda *a, **k: torch.tensor(u, dtype=torch.float64))
        assert Sampler([SamplingParams(seed=0)])(logits).item() == (2 if u < .5 else 3)

def test_tiny_temperature_is_greedy_and_does_not_overflow():
    logits = torch.tensor([[1e4, 9e3, -1e4]])
    for T in (0, 1e-30, 1e-7, 1e-5, 1e-3): assert Sampler([SamplingParams(temperature=T, seed=0)])(logits).item() == 0

# --- cache and batch change nothing ---------------------------------------------------------------------------------------

@pytest.mark.parametrize('params', MIXED, ids=str)
def test_cached_is_uncached(model, params):
    p = SamplingParams(**params, max_new_tokens=24)
    for prompt in rand_prompts([1, 7, 30]): assert generate_ids(model, [prompt], p) == [uncached(model, prompt, p)]

def test_batched_is_single(model):
    ps = [SamplingParams(**d, max_new_tokens=n) for d,n in zip(MIXED, (30, 5, 20, 12, 25, 30, 9))]
    prompts = rand_prompts([3, 17, 1, 30, 8, 8, 2])
    together = generate_ids(model, prompts, ps)
    assert together == [generate_ids(model, [x], p)[0] for x,p in zip(prompts, ps)]
    assert [len(x) for x in together] == [30, 5, 20, 12, 25, 30, 9]

def test_the_same_seed_gives_the_same_text_whatever_the_neighbours(model):
    a, b = rand_prompts([5, 11]); p = SamplingParams(seed=11, max_new_tokens=20)
    alone = generate_ids(model, [a], p)[0]
    assert generate_ids(model, [b, a], [SamplingParams(seed=12, max_new_tokens=40), p])[1] == alone
    assert generate_ids(model, [a, b, a], p)[::2] == [alone, alone]
    assert generate_ids(model, [a], SamplingParams(seed=12, max_new_tokens=20))[0] != alone

def test_without_a_seed_rows_differ_and_set_seed_repeats_them(model):
    a, = rand_prompts([5]); p = SamplingParams(max_new_tokens=20)
    set_seed(5); one = generate_ids(model, [a, a], p)
    set_seed(5); two = generate_ids(model, [a, a], p)
    assert one == two and one[0] != one[1]

def test_a_request_with_a_seed_does_not_touch_the_global_generator(model):
    set_seed(5); before = torch.get_rng_state()
    generate_ids(model, rand_prompts([5]), SamplingParams(seed=1, max_new_tokens=5))
    assert torch.equal(torch.get_rng_state(), before)

def test_finished_rows_leave_the_batch(model, monkeypatch):
    shapes, forward = [], model.model.forward
    monkeypatch.setattr(model.model, 'forward', lambda idx, *a, **k: shapes.append(tuple(idx.shape)) or forward(idx, *a, **k))
    generate_ids(model, rand_prompts([4, 9, 2]), [SamplingParams(temperature=0, max_new_tokens=n) for n in (2, 5, 3)])
    assert shapes == [(3, 9), (3, 1), (2, 1), (1, 1), (1, 1)]                     # and not one step more

def test_logprobs_are_those_of_the_unfiltered_model(model):
    prompt, = rand_prompts([6])
    g, = complete(model, [prompt], SamplingParams(temperature=.5, top_k=3, seed=0, max_new_tokens=10))
    with torch.no_grad(): lp = model(torch.tensor([prompt + g.ids])).float().log_softmax(-1)[0]
    want = [lp[len(prompt)-1+i, t].item() for i,t in enumerate(g.ids)]
    assert g.logprobs == pytest.approx(want, abs=1e-4)

def test_greedy_equals_transformers_generate(model):
    from transformers import LlamaConfig, LlamaForCausalLM
    c = model.cfg
    hf = LlamaForCausalLM(LlamaConfig(vocab_size=V, hidden_size=c.d_model, intermediate_size=c.d_ff, num_hidden_layers=c.n_layer,
                                      num_attention_heads=c.n_head, num_key_value_heads=c.n_kv_head,
        head_dim=c.head_dim, max_position_embeddings=c.max_seq_len, rms_norm_eps=c.norm_eps, rope_theta=c.rope_theta,
        tie_word_embeddings=c.tied, bos_token_id=None, eos_token_id=None)).eval()
    assert set(hf.load_state_dict(model.state_dict(), strict=False).missing_keys) <= {'lm_head.weight'}
    hf.tie_weights()
    for pen in (1., 1.3):
        for prompt in rand_prompts([1, 10, 20]):
            out = hf.generate(torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long), do_sample=False,
                              max_new_tokens=30, min_new_tokens=30,
                              repetition_penalty=pen, pad_token_id=0, eos_token_id=None)
            assert generate_ids(model, [prompt],
                                SamplingParams(temperature=0, repetition_penalty=pen, max_new_tokens=30)) == [out[0, len(prompt):].tolist()]

# --- ends -----------------------------------------------------------------------------------------------------------------

def test_a_stop_token_ends_a_row_and_is_not_part_of_it(model):
    prompt, = rand_prompts([6]); p = SamplingParams(temperature=0, repetition_penalty=1.5, max_new_tokens=20)
    free, = generate_ids(model, [prompt], p)
    stop = next(t for i,t in enumerate(free) if i > 2 and t not in free[:i]); at = free.index(stop)
    g, other = complete(model, [prompt, prompt[:3]], p, stop_ids=[stop])
    assert (g.ids, g.finish_reason, g.stop, len(g.logprobs)) == (free[:at], 'stop', stop, at+1)
    assert generate_ids(model, [prompt], p, stop_ids=[stop]) == [free[:at]]

def test_the_context_is_the_limit(model):
    n = model.cfg.max_seq_len; full, nearly, short = rand_prompts([n, n-3, 2])
    gens = complete(model, [full, nearly, short], SamplingParams(temperature=0, max_new_tokens=5))
    assert [(len(g.ids), g.finish_reason) for g in gens] == [(0, 'length'), (3, 'length'), (5, 'length')]
    assert complete(model, [full], SamplingParams(max_new_tokens=5))[0].ids == []
    with pytest.raises(SLMError, match=rf'prompt 1 has {n+1} tokens, the context holds {n}'):
        generate_ids(model, [short, full+[1]], SamplingParams())

def test_no_prompts_no_texts(model, tok): assert generate_ids(model, [], SamplingParams()) == [] == generate(model, tok, [])

# --- text -----------------------------------------------------------------------------------------------------------------

class Pieces:
    "A tokenizer whose token i is the i-th piece of bytes"
    eot_id = end_id = None; stop_ids = ()
    def __init__(self, pieces): self.pieces = pieces
    def decode_bytes(self, ids): return b''.join(self.pieces[i] for i in ids)

def cut_by_definition(text, stop):
    "Read character by character; end as soon as a stop string is complete"
    for n in range(len(text)+1):
        done = [s for s in stop if text[:n].endswith(s)]
        if done: return text[:n-max(map(len, done))]
    return text

def chop(data, borders):
    edges = sorted({b % (len(data)+1) for b in borders} | {0, len(data)})
    return [data[a:b] for a,b in zip(edges, edges[1:])]

def streamed(pieces, stop):
    ts = TextStream(Pieces(pieces), stop)
    return [ts.add(i) for i in range(len(pieces))] + [ts.flush()]

@settings(max_examples=300, deadline=None)
@given(text=st.text(alphabet='ab c❄é🙂\n', max_size=30), stop=st.lists(st.text(alphabet='ab ❄é\n', min_size=1, max_size=4), max_size=3),
       borders=st.lists(st.integers(0, 200), max_size=25))
def test_streaming_cuts_like_the_definition_whatever_the_token_borders(text, stop, borders):
    out = streamed(chop(text.encode(), borders), stop)
    assert ''.join(out) == cut_by_definition(text, stop)
    assert all('\ufffd' not in piece for piece in out)

@settings(max_examples=200, deadline=None)
@given(data=st.binary(max_size=30), borders=st.lists(st.integers(0, 200), max_size=15))
def test_any_bytes_stream_as_they_decode_at_once(data, borders):
    got, whole = ''.join(streamed(chop(data, borders), [])), data.decode('utf-8', 'replace')
    assert whole.startswith(got) and whole[len(got):] in ('', '\ufffd')             # at most half a character is dropped, at the very end

def test_text_is_held_back_only_while_it_may_become_a_stop():
    assert streamed([b'a', b'b', b'c', b'x', b'ab', b'cd', b'e'], ['abcd']) == ['', '', '', 'abcx', '', '', '', '']
    assert streamed([b'ab', b'c'], ['abcd']) == ['', '', 'abc']                      # released at the end
    assert streamed([b'aab'], ['ab']) == ['a', '']

def test_stream_is_generate(talker, tok):
    for seed in range(6):
        kw = dict(temperature=1.3, seed=seed, max_new_tokens=40, stop=['the', ' c'])
        s = stream(talker, tok, 'the cat', **kw); pieces = list(s)
        assert isinstance(s, Stream) and ''.join(pieces) == generate(talker, tok, 'the cat', **kw) == s.result.text and all(pieces)
        assert 'the' not in s.result.text and ' c' not in s.result.text and s.result.finish_reason in ('stop', 'length')

def test_stop_string_ends_the_row_and_is_named(talker, tok):
    free = generate(talker, tok, 'the cat', temperature=0, repetition_penalty=1.4, max_new_tokens=40)
    stop = free[10:13]; at = free.index(stop)
    g, = complete(talker, [tok.encode('the cat')], SamplingParams(temperature=0, repetition_penalty=1.4, max_new_tokens=40, stop=stop), tok)
    assert (g.text, g.finish_reason, g.stop) == (free[:at], 'stop', stop) and len(g.ids) < 40

def test_generate_takes_one_text_or_many_and_one_value_or_many(talker, tok):
    kw = dict(max_new_tokens=15)
    a, b = generate(talker, tok, ['the cat', 'a longer prompt about a dog'], temperature=[0, 1.2], seed=[1, 2], **kw)
    assert a == generate(talker, tok, 'the cat', temperature=0, **kw)
    assert b == generate(talker, tok, 'a longer prompt about a dog', temperature=1.2, seed=2, **kw)
    assert generate(talker, tok, ['the cat'], temperature=0, **kw) == [a]
    with pytest.raises(SLMError, match='seed has 2 values for 1 prompts'): generate(talker, tok, 'x', seed=[1, 2])

def test_an_empty_prompt_begins_a_document(talker, tok):
    p = SamplingParams(temperature=0, max_new_tokens=8)
    assert generate(talker, tok, '', temperature=0, max_new_tokens=8) == complete(talker, [[tok.eot_id]], p, tok)[0].text

def test_default_stop_tokens_are_end_of_text_and_end_of_turn(talker, tok, monkeypatch):
    for special in (tok.eot_id, tok.end_id):
        monkeypatch.setattr(Sampler, '__call__', lambda self, logits, seen=None: torch.full((len(logits),), special))
        g, = complete(talker, [[65]], SamplingParams(), tok)
        assert (g.ids, g.text, g.finish_reason, g.stop) == ([], '', 'stop', special)

# --- faults and side effects ----------------------------------------------------------------------------------------------

@pytest.mark.parametrize('bad',
                         [dict(temperature=-.1), dict(temperature=math.nan), dict(temperature=math.inf), dict(temperature='1'),
                          dict(top_k=-1), dict(top_k=2.), dict(top_p=0), dict(top_p=1.01),
                                 dict(min_p=-.1), dict(min_p=1.1), dict(repetition_penalty=0), dict(max_new_tokens=0),
                                 dict(max_new_tokens=True), dict(stop=['a', '']), dict(stop=[1]), dict(seed=-1), dict(seed=2**63)], ids=str)
def test_nonsense_is_refused_by_name(bad):
    name, = bad
    with pytest.raises(SLMError, match=f'^{name}=.*must be'): SamplingParams(**bad)

def test_faulty_requests_are_refused_before_any_computing(model, tok, monkeypatch):
    monkeypatch.setattr(model.model, 'forward', None)
    for prompts, params, say in (([[]], SamplingParams(), 'prompt 0 is empty'), ([[1], [V]], SamplingParams(), f'prompt 1 has token {V}'),
                                 ([[-1]], SamplingParams(), 'token -1'),
                                 ([[1]], SamplingParams(stop='x'), 'need a tokenizer'),
                                 ([[1]], [SamplingParams()]*2, '2 sampling parameters for 1 prompts')):
        with pytest.raises(SLMError, match=say): generate_ids(model, prompts, params)
        with pytest.raises(SLMError, match=say): decode(model, prompts, params)         # at the call, not at the first token
    with pytest.raises(SLMError, match='temperature'): stream(model, tok, 'x', temperature=-1)

def test_an_encoder_cannot_generate():
    m = GPT(GPTConfig(vocab_size=V, n_layer=1, n_head=2, n_kv_head=2, d_model=16, d_ff=32, head_dim=8, max_seq_len=8, causal=False))
    with pytest.raises(SLMError, match='cannot generate'): generate_ids(m, [[1]], SamplingParams())

def test_a_damaged_model_says_so(model):
    import copy
    m = copy.deepcopy(model); next(m.parameters()).data.fill_(math.nan)
    with pytest.raises(SLMError, match='not a number'): generate_ids(m, [[1, 2]], SamplingParams())

def test_training_mode_and_gradients_are_left_as_they_were(talker, tok):
    talker.train()
    try:
        for _ in stream(talker, tok, 'the', max_new_tokens=3, seed=0): assert torch.is_grad_enabled() and talker.training
    finally: talker.eval()
    generate(talker, tok, 'the', max_new_tokens=2)
    assert torch.is_grad_enabled() and not talker.training

@pytest.mark.parametrize('pos', ['rope', 'learned', 'sinusoidal', 'alibi', 'none'])
def test_every_position_variant_decodes_cached_and_batched_as_uncached(pos):
    set_seed(2)
    m = GPT(GPTConfig(vocab_size=V, n_layer=2, n_head=4, n_kv_head=4, d_model=32, d_ff=64, head_dim=8, max_seq_len=40, pos=pos)).eval()
    with torch.no_grad():
        for p in m.parameters():
            if p.ndim > 1: p.normal_(0, .4)
    p, prompts = SamplingParams(temperature=0, repetition_penalty=1.5, max_new_tokens=10), rand_prompts([12, 3, 30])
    assert generate_ids(m, prompts, p) == [uncached(m, x, p) for x in prompts]

def test_kinder_ways_to_say_it():
    import numpy as np
    assert SamplingParams(stop=None).stop == SamplingParams().stop == [] and SamplingParams(stop=('a', 'b')).stop == ['a', 'b']
    p = SamplingParams(temperature=np.float32(.5), top_k=np.int64(3), seed=np.int64(7))
    assert Sampler([p])(torch.randn(1, 9)).shape == (1,)

def test_a_family_that_marks_the_beginning_of_a_text_gets_its_mark(talker, tok, monkeypatch):
    kw = dict(temperature=0, max_new_tokens=8)
    monkeypatch.setattr(tok, 'bos_id', 7)
    want = complete(talker, [[7] + tok.encode('the cat')], SamplingParams(**kw), tok)[0].text
    assert generate(talker, tok, 'the cat', **kw) == want == ''.join(stream(talker, tok, 'the cat', **kw))
    assert generate(talker, tok, '', **kw) == complete(talker, [[7]], SamplingParams(**kw), tok)[0].text

def test_rows_of_the_head_without_a_token_are_never_chosen(tok):
    set_seed(4)
    m = GPT(GPTConfig(vocab_size=tok.vocab_size+500, n_layer=1, n_head=2, d_model=16, d_ff=32, max_seq_len=64, tied=False)).eval()
    with torch.no_grad(): m.lm_head.weight[tok.vocab_size:] *= 100                 # they would win nearly always
    assert max(generate_ids(m, [[1]], SamplingParams(max_new_tokens=30, seed=0))[0]) >= tok.vocab_size
    for kw in (dict(temperature=0, repetition_penalty=1.2), dict(seed=0)):
        g, = complete(m, [tok.encode('the cat')], SamplingParams(max_new_tokens=30, **kw), tok, stop_ids=[])
        assert max(g.ids) < tok.vocab_size and len(g.ids) == 30

@pytest.mark.parametrize('how', ['weights', 'autocast'])
def test_bfloat16_decodes(model, how):
    import copy
    m = copy.deepcopy(model).bfloat16() if how == 'weights' else model
    ps = [SamplingParams(temperature=0, max_new_tokens=6), SamplingParams(temperature=.7, seed=0, max_new_tokens=9)]
    with torch.autocast('cpu', torch.bfloat16, enabled=how == 'autocast'): out = generate_ids(m, rand_prompts([5, 12]), ps)
    assert [len(x) for x in out] == [6, 9] and all(0 <= i < V for x in out for i in x)

def test_an_accelerator_gives_what_the_processor_gives(model):
    import copy
    name = 'cuda' if torch.cuda.is_available() else 'mps' if torch.backends.mps.is_available() else pytest.skip('no accelerator here')
    ps, prompts = [SamplingParams(**d, max_new_tokens=12) for d in MIXED], rand_prompts([3, 17, 1, 30, 8, 8, 2])
    assert generate_ids(copy.deepcopy(model).to(name), prompts, ps) == generate_ids(model, prompts, ps)
