"""Fine-tuning to a label: what pretraining and the auxiliary language-model loss are worth.

    python bench/sft.py classify RUN     # RUN: a model pretrained on the world, such as runs/demo/pretrain

Does a story end well? The same texts, steps and seed for each way; accuracy on 1,000 held-out texts with its interval.
Prints JSON and writes it to results/23_train.sft/classify/run.json.
"""
import argparse, json, sys
from functools import partial
from pathlib import Path
from slm.core import Metric, RunDir, set_seed
from slm.data.world import World
from slm.model.gpt import GPT
from slm.model.pretrained import load_model_and_tokenizer
from slm.train.learner import AutoCast, GradClip, LMLearner, Schedule
from slm.train.optim import muon, muon_groups
from slm.train.sft import Classifier, DataLoaders, LabelLoader, class_accuracy, class_loss, endings

ROOT = Path(__file__).parents[1]

def classify(a):
    world,(_,tok) = World(),load_model_and_tokenizer(a.run)
    fits = lambda rows: tuple(zip(*((t, l) for t,l in zip(*rows) if len(t) <= 385)))
    train,valid = fits(endings(world, tok, 31, a.rows)),fits(endings(world, tok, 32, 1000))
    config = dict(rows=len(train[0]), steps=a.steps, bs=16, lr=a.lr, opt='muon')
    run = RunDir.create(a.out, 'bench', config, seed=0, parent=Path(a.run).name, exist_ok=True)
    for name,fresh,aux in (('accuracy', False, .5), ('accuracy_without_aux', False, 0.), ('accuracy_from_scratch', True, .5)):
        set_seed(0); model = load_model_and_tokenizer(a.run)[0]
        clf = Classifier(GPT(model.cfg) if fresh else model, 2).train()
        dls = DataLoaders(LabelLoader(*train, bs=16, pad_id=tok.pad_id), LabelLoader(*valid, bs=50, pad_id=tok.pad_id))
        learn = LMLearner(dls, clf, loss_func=partial(class_loss, aux=aux), opt_func=lambda ps, lr: muon(ps, lr=lr, wd=0.),
                          splitter=muon_groups, lr=a.lr,
                          cbs=[AutoCast(), GradClip(), Schedule(a.steps, warmup=20, cooldown=1.)])
        learn.fit_steps(a.steps); run.add_metrics(**{name: class_accuracy(clf, dls.valid)}); print(name, run.metric(name), file=sys.stderr)
    run.add_metrics(chance=Metric(max(sum(valid[1]), len(valid[1])-sum(valid[1]))/len(valid[1]), n=len(valid[1]), unit='of texts'))
    run.finish(); print(json.dumps(run.info['metrics'], indent=1))

if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('what', choices=['classify']); p.add_argument('run'); p.add_argument('--rows', type=int, default=4000)
    p.add_argument('--steps', type=int, default=300); p.add_argument('--lr', type=float, default=1e-3)
    p.add_argument('--out', type=Path, default=ROOT/'results/23_train.sft/classify')
    classify(p.parse_args())
