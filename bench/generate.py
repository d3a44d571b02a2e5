"""Decoding speed: `slm.model.generate` against transformers' `generate`, on the same weights, and the same tokens out.

    python bench/generate.py [--repeats 7] [--threads 2]

A Llama of 25 million random parameters in float32 on the processor, greedy, in three settings: one prompt; eight
prompts together; eight prompts of different length that want different numbers of tokens (there only tokens that
somebody asked for count). The two take turns, so that a busy machine hits both, and figures are medians over the
repeats. Prints JSON and writes it to results/12_model.generate/bench/run.json.
"""
import argparse, json, time
from pathlib import Path
import numpy as np, torch
from common import median
from slm.core import Metric, RunDir, set_seed
from slm.model.generate import SamplingParams, generate_ids
from slm.model.gpt import GPT, GPTConfig

CFG = GPTConfig(vocab_size=8192, n_layer=8, n_head=8, n_kv_head=4, d_model=512, head_dim=64, max_seq_len=512)

def peer(model):
    "The same weights in transformers' Llama"
    from transformers import LlamaConfig, LlamaForCausalLM
    c = model.cfg
    hf = LlamaForCausalLM(LlamaConfig(vocab_size=c.vocab_size, hidden_size=c.d_model, intermediate_size=c.d_ff,
                                      num_hidden_layers=c.n_layer, num_attention_heads=c.n_head,
        num_key_value_heads=c.n_kv_head, head_dim=c.head_dim, max_position_embeddings=c.max_seq_len, rms_norm_eps=c.norm_eps,
        rope_theta=c.rope_theta,
        tie_word_embeddings=c.tied, bos_token_id=None, eos_token_id=None, pad_token_id=0)).eval()
    lost = hf.load_state_dict(model.state_dict(), strict=False)
    assert not lost.unexpected_keys and set(lost.missing_keys) <= {'lm_head.weight'}, lost
    hf.tie_weights()
    return hf

@torch.no_grad()
def theirs(hf, prompts, wants):
    "transformers pads on the left, and runs until the longest row is done"
    t = max(map(len, prompts))
    ids = torch.tensor([[0]*(t-len(p)) + p for p in prompts]); mask = torch.tensor([[0]*(t-len(p)) + [1]*len(p) for p in prompts])
    out = hf.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=max(wants), pad_token_id=0)
    return [row[t:t+n].tolist() for row,n in zip(out, wants)]

def ours(model, prompts, wants): return generate_ids(model, prompts, [SamplingParams(temperature=0, max_new_tokens=n) for n in wants])

def main():
    ap = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    ap.add_argument('--repeats', type=int, default=7); ap.add_argument('--threads', type=int, default=2)
    ap.add_argument('--out', type=Path, default=Path(__file__).parents[1]/'results'/'12_model.generate'/'bench')
    a = ap.parse_args()
    torch.set_num_threads(a.threads); set_seed(42)
    model = GPT(CFG).eval(); hf = peer(model)
    run = RunDir.create(a.out, 'bench', config=dict(repeats=a.repeats, threads=a.threads, dtype='float32', parameters=model.num_params()),
                        seed=42, exist_ok=True)
    import transformers; run.info['versions']['transformers'] = transformers.__version__
    draw = lambda n: torch.randint(CFG.vocab_size, (n,)).tolist()
    jobs = dict(one=([draw(64)], [64]), eight=([draw(64) for _ in range(8)], [64]*8),
                mixed=([draw(n) for n in (8, 16, 24, 48, 64, 96, 128, 192)], [64, 8, 32, 16, 48, 8, 24, 12]))
    for name,(prompts,wants) in jobs.items():
        same = ours(model, prompts, wants) == theirs(hf, prompts, wants)                     # also the warm-up
        secs = dict(ours=[], transformers=[])
        for _ in range(a.repeats):
            for who,f,m in (('ours', ours, model), ('transformers', theirs, hf)):
                t0 = time.perf_counter(); f(m, prompts, wants); secs[who].append(time.perf_counter()-t0)
        run.add_metrics(**{f'{name}_{who}': median(sum(wants)/np.array(s), 'tokens/s') for who,s in secs.items()},
                        **{f'{name}_ratio': median(np.array(secs['transformers'])/secs['ours'], 'times as fast'),
                           f'{name}_same_tokens': Metric(float(same))})
    run.finish()
    print(json.dumps(run.info['metrics'], indent=1))

if __name__ == '__main__': main()
