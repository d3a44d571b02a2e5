"The model against transformers, against itself taken apart, and its counts against the real module."
import copy, math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from torch.utils.flop_counter import FlopCounterMode
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from slm.core import SLMError
from slm.model.gpt import *
from slm.model.gpt import CHOICES
import slm.model.fast
from slm.model.layers import KVCache
from slm.train.learner import unscored

GPT2 = dict(norm='layer', pos='learned', act='gelu_tanh', bias=True)
BERT = GPT2 | dict(act='gelu', norm_pos='post', causal=False, n_types=2)
SMALL = dict(vocab_size=97, n_layer=2, d_model=64, n_head=4, max_seq_len=64)


def make(seed=0, **kw):
    "A small model whose weights are large enough for errors to show"
    torch.manual_seed(seed); m = GPT(GPTConfig(**(SMALL | kw))).eval()
    for p in m.parameters(): p.data = p.data*2 if p.ndim > 1 else p.data + .1*torch.randn_like(p)
    return m


def close(a, b, tol=1e-4):
    "Within `tol` of the largest value"
    assert (a-b).abs().max() <= tol*b.abs().max(), ((a-b).abs().max()/b.abs().max()).item()


def on_meta(c):
    with torch.device('meta'): return GPT(c)


# ------------------------------------------------------------------ configuration

@pytest.mark.parametrize('kw, says', [
    (dict(d_model=100, n_head=3), 'd_model=100 is not a multiple of n_head=3'),
    (dict(n_head=6, n_kv_head=4), 'n_head=6 is not a multiple of n_kv_head=4'),
    (dict(act='tanh'), "unknown act 'tanh': use one of swiglu"), (dict(norm='batch'), "unknown norm 'batch': use one of rms, layer"),
    (dict(pos='gps'), "unknown pos 'gps': use one of rope"), (dict(norm_pos='mid'), "unknown norm_pos 'mid'"),
    (dict(vocab_size=0), 'vocab_size=0'),
    (dict(n_layer=2.5), 'n_layer=2.5'), (dict(head_dim=-8), 'head_dim=-8'), (dict(head_dim=5), 'head_dim=5 is odd'),
    (dict(dropout=-.1), 'dropout=-0.1'),
    (dict(rope_scaling=dict(rope_type='longrope')), "unknown rope_type 'longrope'"),
    (dict(pos='sinusoidal', d_model=65, n_head=5), 'd_model=65 is odd')])
def test_config_names_what_is_wrong(kw, says):
    with pytest.raises(SLMError) as e: GPTConfig(**kw)
    assert says in str(e.value) and '\n' not in str(e.value)


def test_presets_grow_and_keep_their_names():
    sizes = []
    for name in PRESETS:
        c = GPTConfig.preset(name); n = c.param_counts()
        sizes.append(n['attention'] + n['mlp'])
        assert c.d_model == 64*c.n_layer and c.head_dim == 64 and .85 < sizes[-1]/(int(name[:-1])*1e6) < 1.25
    assert sizes == sorted(sizes)
    with pytest.raises(SLMError, match="unknown preset '2m': use one of 1m"): GPTConfig.preset('2m')
    with pytest.raises(SLMError, match="unknown model option 'layers'"): GPTConfig.preset('1m', layers=3)


# ------------------------------------------------------------------ parity with transformers (their names are ours)

LLAMA3 = dict(rope_type='llama3', factor=8., low_freq_factor=1., high_freq_factor=4., original_max_position_embeddings=32)
HF = dict(vocab_size=97, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4, max_position_embeddings=64,
          rms_norm_eps=1e-5, initializer_range=.2)

@pytest.mark.parametrize('kv', [1, 2, 4])
@pytest.mark.parametrize('kind', ['tied', 'untied', 'llama3', 'qwen3'])
def test_logits_are_transformers(kind, kv):
    cfg = GPTConfig(97, 3, 4, kv, 64, 96, max_seq_len=64, tied=kind != 'untied', qk_norm=kind == 'qwen3',
                    head_dim=32 if kind == 'qwen3' else None,
                    rope_scaling=LLAMA3 if kind == 'llama3' else None, rope_theta=500_000. if kind == 'llama3' else 10_000.)
    hf = HF | dict(num_key_value_heads=kv, tie_word_embeddings=cfg.tied)
    if kind == 'llama3': hf['rope_parameters'] = dict(rope_theta=500_000., **LLAMA3)
    torch.manual_seed(0)
    theirs = (Qwen3ForCausalLM(Qwen3Config(**hf, head_dim=32)) if kind == 'qwen3' else LlamaForCausalLM(LlamaConfig(**hf))).eval()
    sd = theirs.state_dict()
    if cfg.tied: del sd['lm_head.weight']
    ours = GPT(cfg).eval(); ours.load_state_dict(sd)                             # strict: the names are the same
    x = torch.randint(97, (2, 60))
    with torch.no_grad(): close(ours(x), theirs(x).logits, 1e-5)


def test_encoder_is_bert():
    c = BertConfig(vocab_size=97, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128,
                   max_position_embeddings=64, layer_norm_eps=1e-5, initializer_range=.2)
    torch.manual_seed(0); theirs = BertModel(c, add_pooling_layer=False).eval()
    for n, p in theirs.named_parameters():
        if p.ndim == 1: p.data += .1*torch.randn_like(p)
    ours, sd = GPT(GPTConfig(**(SMALL | BERT), d_ff=128)).eval(), {}
    emb = dict(word_embeddings='embed_tokens', position_embeddings='embed_positions', token_type_embeddings='embed_types',
               LayerNorm='embed_norm')
    lay = {'attention.self.query': 'self_attn.q_proj', 'attention.self.key': 'self_attn.k_proj',
           'attention.self.value': 'self_attn.v_proj', 'attention.output.dense': 'self_attn.o_proj',
           'attention.output.LayerNorm': 'post_attention_layernorm', 'intermediate.dense': 'mlp.up_proj', 'output.dense': 'mlp.down_proj',
           'output.LayerNorm': 'post_feedforward_layernorm'}
    for n, w in theirs.state_dict().items():
        part, kind = n.rsplit('.', 1)
        if part.startswith('embeddings.') and part[11:] in emb: sd[f'{emb[part[11:]]}.{kind}'] = w
        elif part.startswith('encoder.layer.'): i, rest = part[14:].split('.', 1); sd[f'layers.{i}.{lay[rest]}.{kind}'] = w
    ours.model.load_state_dict(sd)
    x, ty = torch.randint(97, (3, 20)), torch.randint(2, (3, 20)); lens = torch.tensor([[20], [7], [13]])
    mask = torch.arange(20) < lens
    with torch.no_grad():
        a, b = ours.model(x, seqlens=lens, types=ty), theirs(x, attention_mask=mask.long(), token_type_ids=ty).last_hidden_state
    close(a[mask], b[mask], 1e-5)


# ------------------------------------------------------------------ cache and documents

@settings(max_examples=12, deadline=None)
@given(pos=st.sampled_from(CHOICES['pos']), kv=st.sampled_from([1, 2, 4]), data=st.data())
def test_cache_changes_nothing(pos, kv, data):
    "Rows of any length, fed in pieces of any length, get the logits that each row gets alone and whole"
    m = make(pos=pos, n_kv_head=kv); b = data.draw(st.integers(1, 3))
    x = torch.randint(97, (b, 24)); cache = KVCache(2, b, kv, 24, 16)
    with torch.no_grad():
        whole, done, rows = m(x), [0]*b, list(range(b))
        for _ in range(4):
            lens = data.draw(st.lists(st.integers(1, 6), min_size=len(rows), max_size=len(rows)))
            if data.draw(st.booleans()): lens = [lens[0]]*len(rows)
            t = max(lens) + data.draw(st.integers(0, 2)); piece = torch.zeros(len(rows), t, dtype=torch.long)
            for i, (r, n) in enumerate(zip(rows, lens)): piece[i, :n] = x[r, done[r]:done[r]+n]
            out = m(piece, cache, None if lens == [t]*len(rows) else torch.tensor(lens)[:, None])
            for i, (r, n) in enumerate(zip(rows, lens)):
                close(out[i, :n], whole[r, done[r]:done[r]+n]); done[r] += n
            if len(rows) > 1 and data.draw(st.booleans()): rows.pop(0); cache.keep(range(1, len(rows)+1))


@pytest.mark.parametrize('pos', CHOICES['pos'])
@pytest.mark.parametrize('causal', [True, False])
def test_documents_are_alone(pos, causal):
    m = make(pos=pos, causal=causal, n_kv_head=2); x = torch.randint(97, (3, 30))
    lens = torch.tensor([[5, 20, 3, 0], [30, 0, 0, 0], [9, 9, 9, 3]])            # the first row ends in padding
    with torch.no_grad():
        out = m(x, seqlens=lens)
        for r in range(3):
            at = 0
            for n in filter(None, lens[r].tolist()): close(out[r, at:at+n], m(x[r:r+1, at:at+n])[0]); at += n
    assert out.isfinite().all()


def varlen_by_hand(q, k, v, starts, _, most, __, *, window_size, enable_gqa):
    "What `varlen_attn` computes, a document at a time"
    out = torch.empty_like(q)
    for a,b in zip(starts.tolist(), starts.tolist()[1:]):
        if a == b: continue
        q_, k_, v_ = (x[a:b].transpose(0, 1)[None] for x in (q, k, v))
        out[a:b] = F.scaled_dot_product_attention(q_, k_, v_, is_causal=window_size == (-1, 0), enable_gqa=enable_gqa)[0].transpose(0, 1)
    return out

@pytest.mark.parametrize('kw', [dict(n_kv_head=2, qk_norm=True), GPT2, dict(causal=False), dict(fused=True)], ids=str)
def test_documents_without_a_mask(kw, monkeypatch):
    "The way that a card with FlashAttention takes gives the logits and the gradients of the mask"
    fused = kw.pop('fused', False); m = make(**kw)
    x, lens = torch.randint(0, 97, (3, 30)), torch.tensor([[7, 20, 0], [30, 0, 0], [1, 9, 20]])
    if fused: m.fuse_()
    def run():
        out = m(x, seqlens=lens)
        return out, [] if fused else torch.autograd.grad(out.square().sum(), [*m.parameters()])
    want, grads = run(); used = []
    monkeypatch.setattr('slm.model.gpt.can_varlen', lambda *a: True)
    monkeypatch.setattr('slm.model.layers._varlen_attn', lambda *a, **kw: (used.append(a[5]), varlen_by_hand(*a, **kw))[1])
    got, grads2 = run()
    close(got, want); assert used == [30]*m.cfg.n_layer
    top = max([g.abs().max() for g in grads], default=0)                         # a key's bias has no gradient
    for a,b in zip(grads2, grads): assert (a-b).abs().max() <= 1e-4*max(b.abs().max(), 1e-3*top)

def test_no_gradient_crosses_a_document():
    m = make(); x = torch.randint(97, (1, 20)); x[0, :8] %= 40; x[0, 8:] = x[0, 8:] % 40 + 40    # disjoint tokens
    loss = lm_loss(m(x, seqlens=torch.tensor([[8, 12]]))[:, 8:], x[:, 8:] )
    g = torch.autograd.grad(m.model(x, seqlens=torch.tensor([[8, 12]]))[:, 8:].sum(), m.model.embed_tokens.weight)[0]
    assert g[:40].abs().max() == 0 and g[40:80].abs().max() > 0 and loss.isfinite()
    g = torch.autograd.grad(m.model(x)[:, 8:].sum(), m.model.embed_tokens.weight)[0]
    assert g[:40].abs().max() > 0                                                # without seqlens it does


@pytest.mark.parametrize('causal', [True, False])
def test_right_padding(causal):
    m = make(causal=causal); x = torch.randint(97, (3, 12)); lens = [12, 4, 7]
    with torch.no_grad():
        out = m(x, seqlens=torch.tensor(lens)[:, None])
        for r, n in enumerate(lens): close(out[r, :n], m(x[r:r+1, :n])[0])


def test_faults_are_named():
    m = make(); x = torch.randint(97, (2, 5)); cache = lambda **kw: KVCache(2, 2, 4, 8, 16)
    with pytest.raises(SLMError, match=r'seqlens has the shape \(3, 1\)'): m(x, seqlens=torch.ones(3, 1, dtype=torch.long))
    with pytest.raises(SLMError, match=r'with a cache, seqlens is \(b,1\)'): m(x, cache(), torch.ones(2, 2, dtype=torch.long))
    with pytest.raises(SLMError, match='cannot use a cache'): make(causal=False)(x, cache())
    with pytest.raises(SLMError, match='only 64 positions were learned'): make(pos='learned')(torch.zeros(1, 65, dtype=torch.long))
    c = cache(); m(x, c)
    with pytest.raises(SLMError, match='the cache holds 8 tokens a row, 10 are needed'): m(x, c)
    assert c.lens.tolist() == [5, 5]


# ------------------------------------------------------------------ numbers

def test_rotary_speeds_survive_casts_and_copies():
    m = make(); x = torch.randint(97, (1, 60)); m(x)
    half = copy.deepcopy(m).bfloat16()
    assert all(t.dtype == torch.float32 for t in half.model.fixed.values())
    assert not [k for k in m.state_dict() if 'fixed' in k or 'inv_freq' in k or 'rot' in k]
    # bf16 weights and activations; a wrong angle costs far more
    with torch.no_grad(): close(half(x).float(), m(x), .05)
    bad = copy.deepcopy(half); bad.model.fixed = {k: v*1.02 for k, v in bad.model.fixed.items()}
    with torch.no_grad(): assert (bad(x).float()-m(x)).abs().max() > .05*m(x).abs().max()


def test_autocast_learns_the_same():
    m = make(n_kv_head=2); x = torch.randint(97, (4, 40))
    lm_loss(m(x), x).backward(); ref = [p.grad.clone() for p in m.parameters()]; m.zero_grad()
    with torch.autocast('cpu', torch.bfloat16): loss = lm_loss(m(x), x)
    loss.backward()
    for g, p in zip(ref, m.parameters()): assert F.cosine_similarity(g.flatten(), p.grad.flatten(), 0) > .98


@pytest.mark.parametrize('v, d', [(100, 64), (1000, 64), (1000, 256)])
def test_loss_at_the_start(v, d):
    torch.manual_seed(0); m = GPT(GPTConfig(vocab_size=v, n_layer=4, d_model=d)); x, y = torch.randint(v, (2, 8, 64))
    assert abs(lm_loss(m(x), y).item() - math.log(v) - .2) < .06


def test_lm_loss():
    torch.manual_seed(0); logits, y = torch.randn(2, 5, 7, requires_grad=True), torch.randint(7, (2, 5)); mask = torch.rand(2, 5) < .5
    by_hand = -logits.log_softmax(-1).gather(-1, y[..., None])[..., 0]
    torch.testing.assert_close(lm_loss(logits, y), by_hand.mean())
    torch.testing.assert_close(lm_loss(logits, y, mask), by_hand[mask].mean())
    g, = torch.autograd.grad(lm_loss(logits, y, mask), logits)
    assert g[~mask].abs().max() == 0 and g[mask].abs().min() > 0
    none = lm_loss(logits, y, torch.zeros_like(mask)); assert none.item() == 0


@pytest.mark.parametrize('tied', [True, False])
@pytest.mark.parametrize('parts', [1, 2, 7, 100])
def test_head_and_loss_in_parts(parts, tied):
    "The loss and every gradient of a whole model, as PyTorch computes them from all logits"
    m = make(tied=tied); x, y = torch.randint(97, (2, 3, 16)); mask = torch.rand(3, 16) < .6
    F.cross_entropy(m(x).flatten(0, 1), y.masked_fill(~mask, -100).flatten()).backward()
    want = {n: p.grad.clone() for n,p in m.named_parameters()}; m.zero_grad()
    loss = lm_loss(Unscored(m(x, scored=False), m.matrix()), y, mask, most=math.ceil(48*97/parts))
    loss.backward(torch.tensor(3.))
    for n,p in m.named_parameters(): torch.testing.assert_close(p.grad/3, want[n], rtol=1e-4, atol=1e-6)
    nats = token_nats(Unscored(m(x, scored=False), m.matrix()), y)
    torch.testing.assert_close((nats*mask).sum()/mask.sum(), loss.detach())


def test_parts_without_a_gradient_of_the_head():
    m = make(tied=False).requires_grad_(False); h = torch.randn(2, 9, m.cfg.d_model, requires_grad=True); y = torch.randint(97, (2, 9))
    lm_loss(Unscored(h, m.matrix()), y, most=97*5).backward(); g, h.grad = h.grad, None
    F.cross_entropy(m.head(h).flatten(0, 1), y.flatten()).backward()
    torch.testing.assert_close(g, h.grad); assert m.lm_head.weight.grad is None
    lm_loss(Unscored(h, m.matrix()), y, torch.zeros(2, 9), most=97*5).backward()     # nobody counts
    torch.testing.assert_close(h.grad, g)


def test_what_has_no_scores_yet_gives_them_and_can_be_copied():
    o = Unscored(torch.randn(2, 3, 8), torch.randn(5, 8)); z = F.linear(o.h, o.weight)
    assert o.shape == (2, 3, 5) and torch.equal(o.argmax(-1), z.argmax(-1))
    c = copy.deepcopy(o); assert type(c) is Unscored and torch.equal(c.h, o.h)
    with pytest.raises(AttributeError): o.nothing_of_the_kind


def test_a_head_that_is_no_matrix_keeps_its_scores():
    m = make(tied=False); assert m.matrix() is m.lm_head.weight and make().matrix() is not None
    m.lm_head = torch.nn.Sequential(m.lm_head); assert m.matrix() is None and unscored(m) == ()
    assert GPT(GPTConfig(vocab_size=97, n_layer=1, d_model=64)).fuse_().matrix() is None


def test_dropout_only_while_training():
    m = make(dropout=.5); x = torch.randint(97, (1, 10))
    assert torch.equal(m(x), m(x)); m.train(); assert not torch.equal(m(x), m(x))


# ------------------------------------------------------------------ counts

switches = st.fixed_dictionaries(dict(
    vocab_size=st.integers(1, 99), n_layer=st.integers(1, 3), n_head=st.sampled_from([2, 4]), n_kv_head=st.sampled_from([1, 2]),
    d_model=st.sampled_from([16, 64]),
    head_dim=st.sampled_from([None, 4, 32]), norm=st.sampled_from(CHOICES['norm']), norm_pos=st.sampled_from(CHOICES['norm_pos']),
    pos=st.sampled_from(CHOICES['pos']),
    act=st.sampled_from(CHOICES['act']), bias=st.booleans(), qk_norm=st.booleans(), tied=st.booleans(), n_types=st.integers(0, 3)))

@settings(max_examples=80, deadline=None)
@given(switches)
def test_parameters_by_formula(kw):
    c = GPTConfig(**kw); assert c.num_params() == on_meta(c).num_params()


@settings(max_examples=15, deadline=None)
@given(switches, st.integers(1, 40))
def test_operations_by_formula(kw, t):
    c = GPTConfig(**kw, causal=False, max_seq_len=64); m = GPT(c); x = torch.randint(c.vocab_size, (2, t))
    # one query takes another kernel, which is counted otherwise
    if t == 1: t = 2; x = x.expand(2, 2).contiguous()
    with FlopCounterMode(display=False) as f: lm_loss(m(x), x).backward()
    assert f.get_total_flops() == m.flops_per_token(t)*2*t


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
@pytest.mark.parametrize('sw',
                         [{}, GPT2, dict(act='relu'), dict(act='reglu', qk_norm=True), dict(n_kv_head=1, head_dim=32), dict(causal=False)],
                         ids=str)
def test_memory_by_formula(sw, dtype):
    "Saved tensors within 3 %"
    c = GPTConfig(**(dict(vocab_size=500, n_layer=4, d_model=128, n_head=4, max_seq_len=300) | sw)); torch.manual_seed(0)
    m, x, seen = GPT(c), torch.randint(500, (2, 300)), {}
    own = {p.untyped_storage().data_ptr() for p in m.parameters()}
    def pack(o):
        s = o.untyped_storage()
        if s.data_ptr() not in own: seen[s.data_ptr()] = (s.nbytes(), o)         # held, so that no address is used twice
        return o
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda o: o), torch.autocast('cpu', torch.bfloat16, enabled=dtype == 'bfloat16'):
        lm_loss(m(x), x)
    e = memory_estimate(c, 2, 300, dtype=dtype); want = e['activations'] + e['logits']/2
    got = sum(n for n, _ in seen.values())
    if dtype == 'bfloat16': want += e['weights'] - 4*c.num_params()              # autocast's copies of the weights
    assert abs(got/want - 1) < .03, got/want


def test_decoding_memory():
    c = GPTConfig(**SMALL, n_kv_head=2); e = memory_estimate(c, 3, 40, train=False)
    assert e['cache'] == KVCache(2, 3, 2, 40, 16).nbytes
    assert e['weights'] == 4*GPT(c).num_params() and e['total'] == sum(v for k, v in e.items() if k != 'total')


def test_check_fits():
    c = GPTConfig.preset('1m'); assert check_fits(c, 2, 64)['total'] < 2**30
    with pytest.raises(SLMError, match=r'the model needs about \d+\.\d GiB \(weights .* cpu has 4\.0: take a smaller preset'):
        check_fits(GPTConfig.preset('350m'), 8, 512, memory=4*2**30)
    with pytest.raises(SLMError, match="unknown device 'tpu'"): check_fits(c, 2, 64, device='tpu')


def test_padding_may_stand_past_the_last_learned_position():
    "A row that is almost full is padded beside a longer addition of another row; both equal themselves alone"
    m = make(vocab_size=50, max_seq_len=16, pos='learned')
    a, b = torch.randint(50, (14,)), torch.randint(50, (9,))
    cache = KVCache(2, 2, m.cfg.n_kv_head, 16, m.cfg.head_dim)
    pad = lambda x, n: F.pad(x, (0, n-len(x)))
    with torch.no_grad():
        m(torch.stack([a[:12], pad(b[:3], 12)]), cache, torch.tensor([[12], [3]]))
        out = m(torch.stack([pad(a[12:], 6), b[3:]]), cache, torch.tensor([[2], [6]]))
        for got, alone in ((out[0, :2], m(a[None])[0, 12:]), (out[1], m(b[None])[0, 3:])):
            assert (got-alone).abs().max() < 1e-5
