"""Sorting reviews: models of both kinds with a layer on top, the same untrained, and bags of words.

    python bench/polarity.py --data FOLDER NAME=RUN ... [--seeds 3] [--epochs 3] [--name polarity]

FOLDER holds rt-polarity.neg and .pos, or is a .tsv as SST-2's or CoLA's; a tenth of it, drawn once, is kept for the test. Each seed has
an order of its own. The figure of a model is the share over its seeds, its interval a bootstrap over texts; differences to bags of words
are paired by text. Writes results/59_exp.bert/NAME/run.json.
"""
import argparse
from pathlib import Path
import numpy as np
from slm.core import Metric, RunDir, read_json, set_seed
from slm.eval.stats import percentile_interval
from slm.exp.bert import fit_classifier, predict_classes, read_sentences
from slm.model.bert import load_bert_and_tokenizer
from slm.model.pretrained import load_model_and_tokenizer

ROOT = Path(__file__).parents[1]

def bags(train, y, test):
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    model = make_pipeline(TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True), LogisticRegression(C=10, max_iter=1000))
    return model.fit(train, y).predict(test)

def share(right, n_boot=2000): # (seeds, texts), or differences
    m = right.mean(0); rng = np.random.default_rng(0); draws = m[rng.integers(len(m), size=(n_boot, len(m)))].mean(1)
    return percentile_interval(m.mean(), draws, len(m), 'of texts')

def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter); add = ap.add_argument
    add('--data', required=True); add('runs', nargs='+'); add('--seeds', type=int, default=3); add('--epochs', type=int, default=3)
    add('--name', default='polarity'); a = ap.parse_args(); runs = dict(r.split('=', 1) for r in a.runs)
    texts,labels = read_sentences(a.data); order = np.random.default_rng(0).permutation(len(texts)); n = len(texts)//10
    test,train = order[:n],order[n:]; pick = lambda xs,at: [xs[i] for i in at]; truth = np.array(pick(labels, test))
    config = dict(texts=len(texts), test=n, seeds=a.seeds, epochs=a.epochs, runs=list(runs)); got = {}
    run = RunDir.create(ROOT/'results'/'59_exp.bert'/a.name, 'bench', config, exist_ok=True)
    got['bags_of_words'] = np.array([bags(pick(texts, train), pick(labels, train), pick(texts, test)) == truth])
    print('bags_of_words', got['bags_of_words'].mean(), flush=True)
    for name,path in runs.items():
        load = load_bert_and_tokenizer if read_json(Path(path)/'run.json')['stage'] == 'bert' else load_model_and_tokenizer
        for untrained in (False, True):
            right = []
            for seed in range(a.seeds):
                model,tok = load(path); set_seed(seed); at = np.random.default_rng(seed).permutation(train)
                if untrained: model = type(model)(model.cfg)
                net = fit_classifier(model.train(), tok, pick(texts, at), pick(labels, at), a.epochs, lr=5e-4, seed=seed)
                right.append(predict_classes(net, tok, pick(texts, test)) == truth)
                print(name, untrained, seed, right[-1].mean(), flush=True)
            got[name+'_untrained'*untrained] = np.array(right)
    run.add_metrics(**{k: share(r) for k,r in got.items()})
    bag = got.pop('bags_of_words'); run.add_metrics(**{f'{k}-bags_of_words': share(r.mean(0, keepdims=True)-bag) for k,r in got.items()})
    run.finish()
    for k,v in run.info['metrics'].items(): print(f'{k:28} {Metric(**v)}')

if __name__ == '__main__': main()
