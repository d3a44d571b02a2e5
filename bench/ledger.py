"""A whole life of one model in a biased world, for the ledger: read, answer, prefer, earn, shrink.

    python bench/ledger.py runs/life --minutes 8
    slm report runs/life/pretrain runs/life/sft runs/life/dpo runs/life/rlhf runs/life/served.gguf --out results/38_eval.ledger/world

Each stage is a run of its own in the folder; a stage that is there already is left as it is, so that an interrupted life goes on.
"""
import argparse
from pathlib import Path
from slm.data.world import ASK, World
from slm.eval.life import LIFE_SEED, annotate_run
from slm.model.pretrained import load_model_and_tokenizer
from slm.serve.export import export_gguf
from slm.train.annotate import world_judge
from slm.train.dpo import dpo
from slm.train.pretrain import pretrain
from slm.train.rlhf import grpo
from slm.train.sft import sft

def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter); add = ap.add_argument
    add('out', type=Path)
    add('--minutes', type=float, default=8.)
    add('--dial', type=float, default=.5); add('--asked', type=int, default=1500); add('--steps', type=int, default=30)
    a = ap.parse_args(); name, done = f'world:{a.dial:g}', lambda k: (a.out/k/'model.safetensors').exists()
    if not done('pretrain'): pretrain(name, a.out/'pretrain', preset='1m', minutes=a.minutes, seq_len=384)
    if not done('sft'): sft(a.out/'pretrain', name, a.out/'sft', minutes=a.minutes/2, bs=8, max_rows=8000)
    if not done('dpo'):
        world = World(a.dial); asked = list(world.tasks(LIFE_SEED+2, a.asked, list(ASK)))
        if not (a.out/'preferences.db').exists(): annotate_run(a.out/'sft', a.out/'preferences.db', asked, world_judge(world, asked))
        dpo(a.out/'sft', a.out/'preferences.db', a.out/'dpo', epochs=2.)
    if not done('rlhf'): grpo(a.out/'dpo', name, 'judge', a.out/'rlhf', steps=a.steps, max_rows=2000, seq_len=384)
    export_gguf(*load_model_and_tokenizer(a.out/'rlhf'), a.out/'served.gguf', 'q8_0')

if __name__ == '__main__': main()
