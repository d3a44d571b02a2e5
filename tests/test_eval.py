"Evaluation against lm-eval, and the command that does all of it."
import numpy as np, pytest
from slm.core import SLMError, RunDir
from slm.data.world import World
from slm.eval.lm import loglikelihood, minimal_pairs, evaluate_run
from slm.model.pretrained import load_model_and_tokenizer

@pytest.fixture(scope='module')
def run(tmp_path_factory):
    "A small model of the world"
    from slm.train.pretrain import pretrain
    return pretrain('world', tmp_path_factory.mktemp('runs')/'w', max_bytes=500_000, vocab_size=1024, steps=20, seq_len=256,
                    batch_tokens=4096, evals=1, samples=1,
                    model=dict(n_layer=2, d_model=128))

def pairs(n=150):
    "Sentences of stories, and the same with two words exchanged"
    rows = []
    for s in World().stories(5, n):
        w = s.text.split('. ')[1].split(); bad = [*w]; bad[1],bad[2] = bad[2],bad[1]
        rows.append(dict(sentence_good=' '.join(w)+'.', sentence_bad=' '.join(bad)+'.', UID='order', pairID=str(len(rows))))
    return rows

def test_a_run_is_measured_and_leaves_a_record(run):
    ev = evaluate_run(run.path, n_docs=20, n_probes=40, n_texts=4)
    assert RunDir.open(run.path/'eval').info['status'] == 'done'
    assert ev.metric('floor').value < ev.metric('bpb').value and ev.metric('excess').lo > 0
    with pytest.raises(SLMError, match='no pair'): p = run.path/'p.jsonl'; p.write_text('{}\n'); evaluate_run(run.path, pairs=[p])

def test_the_same_minimal_pairs_the_same_numbers(run):
    model,tok = load_model_and_tokenizer(str(run.path)); rows = pairs(40)
    a, b = (minimal_pairs(model, tok, r)['order'].value for r in (rows, rows[::-1]))
    assert a == b
    ll = loglikelihood(model, tok, [('', r['sentence_good']) for r in rows])
    one = [loglikelihood(model, tok, [('', r['sentence_good'])])[0] for r in rows]
    assert np.allclose(ll, one, atol=1e-3)

@pytest.mark.slow
def test_decisions_are_those_of_lm_eval(run):
    "Log-likelihoods within 1e-3, decisions equal, on the same weights and items"
    pytest.importorskip('lm_eval', reason='needs: pip install lm-eval')
    from lm_eval.models.huggingface import HFLM; from lm_eval.api.instance import Instance
    from transformers import PreTrainedTokenizerFast
    rows = pairs(300)
    model,tok = load_model_and_tokenizer(str(run.path))
    fast = PreTrainedTokenizerFast(tokenizer_file=str(run/'tokenizer.json'), eos_token='<|endoftext|>', pad_token='<|pad|>')
    theirs = HFLM(pretrained=str(run.path), tokenizer=fast, device='cpu', batch_size=8, dtype='float32')
    probes_ = [(s.text[:at-1], ' '+said) for s in World().stories(6, 100) for at,said,_ in s.facts]
    items = [('', r[k]) for r in rows for k in ('sentence_good', 'sentence_bad')]+probes_
    want = theirs.loglikelihood([Instance(request_type='loglikelihood', doc={}, arguments=p, idx=i) for i,p in enumerate(items)])
    got = loglikelihood(model, tok, items)
    assert max(abs(a-b) for a,(b,_) in zip(got, want)) < 1e-3
    n = 2*len(rows); a, b = (np.array(x[:n]).reshape(-1, 2) for x in (got, [w for w,_ in want]))
    assert ((a[:, 0] > a[:, 1]) == (b[:, 0] > b[:, 1])).mean() >= .999

def test_minimal_pairs_with_a_mark_and_half_an_emoji(tmp_path, capsys):
    from slm.eval.lm import read_pairs
    row = '{"sentence_good": "%s", "sentence_bad": "b"}\n'
    (tmp_path/'p.jsonl').write_text(row % 'a' + row % '\\ud83d' + row % 'c', encoding='utf-8-sig')
    assert [r['sentence_good'] for r in read_pairs(tmp_path/'p.jsonl')] == ['a', 'c']
    assert 'line 2: it holds half a character' in capsys.readouterr().err
