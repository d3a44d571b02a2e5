"Layers against references: transformers' modules, plain double-precision attention, and a cache made of Python lists."
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from transformers import LlamaConfig
from transformers.activations import ACT2FN
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.bloom.modeling_bloom import build_alibi_tensor
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

from slm.core import SLMError
from slm.model.layers import *


def reference(q, k, v, bias=None, causal=True):
    "Attention in double precision, nothing clever"
    q, k, v = q.double(), *(o.double().repeat_interleave(q.shape[1]//k.shape[1], 1) for o in (k, v))
    s = q@k.transpose(-1, -2)/q.shape[-1]**.5
    if bias is not None: s = s + bias.double()
    elif causal: s = s.masked_fill(torch.ones(s.shape[-2:], dtype=torch.bool).triu(1), -math.inf)
    return s.softmax(-1)@v


def test_one_query_of_grouped_heads_whatever_the_layout_of_the_answer(monkeypatch):
    "On cuda in float32 attention gives back a transposed tensor, whose dimensions no view can join"
    plain = F.scaled_dot_product_attention
    def transposed(*args, **kwargs): return plain(*args, **kwargs).transpose(1, 2).contiguous().transpose(1, 2)
    monkeypatch.setattr(F, 'scaled_dot_product_attention', transposed); torch.manual_seed(0)
    q, k, v = torch.randn(2, 6, 1, 16), torch.randn(2, 3, 40, 16), torch.randn(2, 3, 40, 16)
    for bias in (None, torch.randn(2, 1, 1, 40), torch.randn(1, 6, 1, 40)):
        torch.testing.assert_close(attend(q, k, v, bias).double(), reference(q, k, v, bias, causal=False), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('dtype, tol', [(torch.float32, 1e-6), (torch.bfloat16, 2**-7)])
def test_rms_norm_is_llamas(dtype, tol):
    torch.manual_seed(0)
    x, ours, theirs = (torch.randn(50, 96)*9).to(dtype), RMSNorm(96, 1e-5), LlamaRMSNorm(96, 1e-5)
    torch.nn.init.normal_(ours.weight); theirs.load_state_dict(ours.state_dict())
    a, b = ours.to(dtype)(x), theirs.to(dtype)(x)
    assert a.dtype == b.dtype == dtype
    torch.testing.assert_close(a, b, rtol=tol, atol=tol)


@pytest.mark.parametrize('kind', ['default', 'linear', 'llama3', 'yarn', 'yarn-more', 'yarn-mscale'])
@pytest.mark.parametrize('theta', [10_000., 500_000.])
def test_rope_speeds_are_transformers(kind, theta):
    p = dict(rope_type=kind, rope_theta=theta) | {
        'default': {}, 'linear': dict(factor=4.),
        'llama3': dict(factor=8., low_freq_factor=1., high_freq_factor=4., original_max_position_embeddings=256),
        'yarn': dict(factor=8., original_max_position_embeddings=256),
        'yarn-more': dict(factor=3., original_max_position_embeddings=600, beta_fast=16, beta_slow=2, attention_factor=1.5, truncate=False),
        'yarn-mscale': dict(factor=40., original_max_position_embeddings=51, mscale=1., mscale_all_dim=.7)}[kind]
    kind = p['rope_type'] = kind.partition('-')[0]
    c = LlamaConfig(hidden_size=256, num_attention_heads=4, max_position_embeddings=2048, rope_parameters=p)
    theirs, scale = ROPE_INIT_FUNCTIONS[kind](c, 'cpu') if kind != 'default' else (1/theta**(torch.arange(0, 64, 2).float()/64), 1.)
    assert yarn_scale(p) == pytest.approx(scale, abs=1e-12)
    torch.testing.assert_close(rope_inv_freq(64, theta, p), theirs, rtol=1e-6, atol=0)


@pytest.mark.parametrize('n', [1, 16, 17, 40, 64])
def test_dynamic_speeds_are_transformers(n):
    p = dict(rope_type='dynamic', rope_theta=10_000., factor=4., original_max_position_embeddings=16)
    c = LlamaConfig(hidden_size=128, num_attention_heads=4, max_position_embeddings=16, rope_parameters=p)
    theirs = ROPE_INIT_FUNCTIONS['dynamic'](c, 'cpu', seq_len=n)[0]
    torch.testing.assert_close(dynamic_speeds(rope_inv_freq(32), torch.tensor(n), p), theirs, rtol=1e-5, atol=0)


def test_old_name_of_rope_type_and_what_is_unknown():
    torch.testing.assert_close(rope_inv_freq(8, scaling=dict(type='linear', factor=2.)), rope_inv_freq(8)/2)
    with pytest.raises(SLMError, match="unknown rope_type 'longrope'"): rope_inv_freq(8, scaling=dict(rope_type='longrope', factor=2.))
    for kind in ('yarn', 'dynamic'):
        with pytest.raises(SLMError, match="lacks 'original_max_position_embeddings'"):
            rope_inv_freq(8, scaling=dict(rope_type=kind, factor=2.))
    with pytest.raises(SLMError, match="lacks 'low_freq_factor'"):
        rope_inv_freq(8, scaling=dict(rope_type='llama3', factor=2., original_max_position_embeddings=8))


@pytest.mark.parametrize('dtype, tol', [(torch.float32, 1e-6), (torch.bfloat16, 2**-6)])
def test_rotation_is_transformers(dtype, tol):
    torch.manual_seed(0)
    q, k = torch.randn(2, 2, 3, 40, 16).to(dtype)
    cos, sin = rope_cos_sin(torch.arange(40), rope_inv_freq(16), dtype)
    a = apply_rotary_pos_emb(q, k, torch.cat((cos, cos), -1)[None], torch.cat((sin, sin), -1)[None])
    for ours, theirs in zip((apply_rope(q, cos, sin), apply_rope(k, cos, sin)), a):
        assert ours.dtype == dtype
        torch.testing.assert_close(ours, theirs, rtol=tol, atol=tol)


@pytest.mark.parametrize('n', [1, 2, 3, 6, 8, 12, 20, 32])
def test_alibi_slopes_are_blooms(n):
    theirs = build_alibi_tensor(torch.ones(1, 2), n, torch.float32)[:, 0, 1]     # distance 1
    torch.testing.assert_close(alibi_slopes(n), theirs)


@pytest.mark.parametrize('ours, theirs',
                         [('gelu', 'gelu'), ('gelu_tanh', 'gelu_new'), ('relu', 'relu'), ('relu2', 'relu2'), ('silu', 'silu')])
def test_activations_are_transformers(ours, theirs):
    x = torch.linspace(-6, 6, 999)
    torch.testing.assert_close(ACTS[ours](x), ACT2FN[theirs](x), rtol=1e-5, atol=1e-6)


@settings(max_examples=60, deadline=None)
@given(b=st.integers(1, 3), m=st.integers(1, 3), g=st.integers(1, 3), t=st.integers(1, 70), n=st.integers(1, 80),
       causal=st.booleans(), kind=st.sampled_from(['none', 'rows', 'heads']), seed=st.integers(0, 99))
def test_blocks_equal_plain_attention(b, m, g, t, n, causal, kind, seed):
    torch.manual_seed(seed)
    q, k, v = torch.randn(b, m*g, t, 8), torch.randn(b, m, t, 8), torch.randn(b, m, t, 8)
    bias = None if kind == 'none' else torch.randn(b, 1, t, t) if kind == 'rows' else torch.randn(1, m*g, t, t)
    if bias is not None and causal: bias = bias.masked_fill(torch.ones(t, t, dtype=torch.bool).triu(1), -math.inf)
    ref = reference(q, k, v, bias, causal).float()
    torch.testing.assert_close(attend_blocks(q, k, v, bias, causal, n), ref, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(attend(q, k, v, bias, causal), ref, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('kind', ['none', 'rows', 'heads'])
def test_one_query_with_grouped_heads(kind):
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 6, 1, 8), torch.randn(3, 2, 11, 8), torch.randn(3, 2, 11, 8)
    bias = dict(none=None, rows=torch.randn(3, 1, 1, 11), heads=torch.randn(1, 6, 1, 11))[kind]
    torch.testing.assert_close(attend(q, k, v, bias), reference(q, k, v, bias, causal=False).float(), rtol=1e-4, atol=1e-5)


def test_gradients_of_blocks():
    torch.manual_seed(0)
    a = [torch.randn(1, h, 9, 4, dtype=torch.double, requires_grad=True) for h in (4, 2, 2)]
    assert torch.autograd.gradcheck(lambda q, k, v: attend_blocks(q, k, v, n=4), a)


def test_long_contexts_take_the_fused_kernel():
    torch.manual_seed(0)
    q, k, v = torch.randn(1, 2, 2100, 8), torch.randn(1, 1, 2100, 8), torch.randn(1, 1, 2100, 8)
    torch.testing.assert_close(attend(q, k, v), reference(q, k, v).float(), rtol=1e-4, atol=1e-5)


@settings(max_examples=50, deadline=None)
@given(rows=st.lists(st.lists(st.integers(1, 6), min_size=1, max_size=4), min_size=1, max_size=4), pad=st.integers(0, 5))
def test_doc_positions(rows, pad):
    t, n = max(map(sum, rows))+pad, max(map(len, rows))
    pos, doc = doc_positions(torch.tensor([r + [0]*(n-len(r)) for r in rows]), t)
    for r, p, d in zip(rows, pos.tolist(), doc.tolist()):
        assert p[:sum(r)] == [i for l in r for i in range(l)]
        assert d[:sum(r)] == [i for i, l in enumerate(r) for _ in range(l)]
        assert set(d[sum(r):]).isdisjoint(d[:sum(r)])


def test_bias_of_alibi_in_documents():
    lens = torch.tensor([[3, 4]]); pos, doc = doc_positions(lens, 7); slopes = alibi_slopes(2)
    got = attn_bias(torch.arange(7)[None], 7, True, doc, slopes)
    for h in range(2):
        for i in range(7):
            for j in range(7):
                want = -slopes[h].item()*(i-j) if j <= i and (i < 3) == (j < 3) else -math.inf
                assert got[0, h, i, j].item() == want


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_cache_equals_lists(data):
    "Any sequence of calls, even and ragged, padded and not, with rows leaving, keeps for each row what was valid"
    b, room = data.draw(st.integers(1, 4)), 20
    cache, rows, count = KVCache(2, b, 1, room, 1), [[] for _ in range(b)], 0
    for _ in range(data.draw(st.integers(1, 6))):
        lens = data.draw(st.lists(st.integers(1, 5), min_size=len(rows), max_size=len(rows)))
        t = max(lens) + data.draw(st.integers(0, 3))
        ragged = data.draw(st.booleans())
        if not ragged: t = lens[0]; lens = [t]*len(rows)
        new = torch.arange(count, count+len(rows)*t).float().view(len(rows), 1, t, 1); count += len(rows)*t
        seqlens = torch.tensor(lens)[:, None] if ragged else None
        before = cache.lens.clone()
        if max(len(r)+n for r, n in zip(rows, lens)) > room:
            with pytest.raises(SLMError, match='the cache holds 20 tokens'): cache.begin(t, seqlens)
            assert torch.equal(cache.lens, before); break
        at = cache.begin(t, seqlens).expand(len(rows), t)
        for i, (r, n) in enumerate(zip(rows, lens)):
            assert at[i, 0] == len(r)
            r += new[i, 0, :n, 0].tolist()
        for layer in range(2): k, v = cache.update(layer, new, -new)
        cache.end()
        for i, r in enumerate(rows):
            assert k[i, 0, :len(r), 0].tolist() == r and v[i, 0, :len(r), 0].tolist() == [-x for x in r]
        if data.draw(st.booleans()) and len(rows) > 1:
            stay = data.draw(st.lists(st.integers(0, len(rows)-1), min_size=1, max_size=len(rows), unique=True))
            cache.keep(stay); rows = [list(rows[i]) for i in stay]
        assert cache.lens.tolist() == [len(r) for r in rows]


def test_padding_at_the_very_end_of_the_cache():
    "Rows may be padded beyond the room, as long as what is valid fits"
    cache = KVCache(1, 2, 1, 6, 1)
    cache.begin(4); cache.update(0, torch.ones(2, 1, 4, 1), torch.ones(2, 1, 4, 1)); cache.end()
    cache.begin(5, torch.tensor([[2], [1]])); k, _ = cache.update(0, torch.full((2, 1, 5, 1), 2.), torch.ones(2, 1, 5, 1)); cache.end()
    assert k[:, 0, :, 0].tolist() == [[1, 1, 1, 1, 2, 2], [1, 1, 1, 1, 2, 0]]
    with pytest.raises(SLMError, match='seqlens says 3 tokens, a row has 2'): KVCache(1, 1, 1, 9, 1).begin(2, torch.tensor([[3]]))


def test_autocast_converts_once():
    with torch.autocast('cpu', torch.bfloat16):
        assert cast_once(torch.ones(2)).dtype == torch.bfloat16
        attn = Attention(32, 2, qk_norm=True)
        out = attn(torch.randn(1, 5, 32), AttnContext(*rope_cos_sin(torch.arange(5), rope_inv_freq(16), torch.bfloat16)))
    assert out.dtype == torch.bfloat16 and cast_once(torch.ones(2)).dtype == torch.float32
    out.float().sum().backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.abs().sum() > 0
               for n,p in attn.named_parameters() if 'v_proj' in n or 'o_proj' in n)


@pytest.mark.parametrize('shape', [(7, 33), (2, 5, 33), (2, 3, 4, 33), (33,)])
def test_gradient_of_rms_norm_by_hand(shape):
    torch.manual_seed(0); norm = RMSNorm(33); torch.nn.init.normal_(norm.weight); x = torch.randn(shape)*3
    got, want = [], []
    for res, f in ((got, norm), (want, lambda x: F.rms_norm(x, (33,), norm.weight, norm.eps))):
        xg = x.clone().requires_grad_(); y = f(xg); res += [y.detach(), *torch.autograd.grad((y*x.cos()).sum(), (xg, norm.weight))]
    for a, b in zip(got, want): torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
