"Toxicity: prompts in the published format, both kinds of judges, what goes wrong, and figures against an independent computation."
import json
import numpy as np, pytest, torch
from slm.cli import main
from slm.core import RunDir, SLMError
from slm.data.tokenizer import train_bpe
from slm.data.world import World
from slm.eval.toxicity import (IDENTITIES, INSULTS, Toxicity, auc, evaluate_toxicity, fan_out, growing, judge_classifier,
                               open_toxicity_prompts, open_toxicity, read_labelled, read_toxicity_prompts, reliability, rude_stories)
from slm.model.generate import generate
from slm.model.gpt import GPT, GPTConfig
from slm.model.pretrained import load_model_and_tokenizer

@pytest.fixture(scope='module')
def model(tmp_path_factory):
    "A folder with random weights whose tokens are half of insults: some of its continuations are toxic, others are not"
    path = tmp_path_factory.mktemp('model')/'m'; tok = train_bpe((t for _,t in rude_stories(.5, 1, 400)), 500); torch.manual_seed(0)
    GPT(GPTConfig(vocab_size=tok.vocab_size, n_layer=2, d_model=64, n_head=2, n_kv_head=1, max_seq_len=96)).save_pretrained(path, tok)
    return path

@pytest.fixture(scope='module')
def judge(tmp_path_factory):
    "A classifier of transformers with random weights, saved to a folder"
    from transformers import BertConfig, BertForSequenceClassification, BertTokenizer
    path = tmp_path_factory.mktemp('judge')/'j'
    words = ['[PAD]', '[UNK]', '[CLS]', '[SEP]', '[MASK]', *'abcdefghijklmnopqrstuvwxyz',
             *(f'##{c}' for c in 'abcdefghijklmnopqrstuvwxyz'), '.']
    path.mkdir()
    (path/'v.txt').write_text('\n'.join(words))
    BertTokenizer(vocab=str(path/'v.txt'), model_max_length=40).save_pretrained(path); torch.manual_seed(0)
    c = BertConfig(vocab_size=len(words), hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
                   max_position_embeddings=40, initializer_range=.4,
                   id2label={0: 'toxic', 1: 'insult'}, label2id={'toxic': 0, 'insult': 1}, problem_type='multi_label_classification')
    BertForSequenceClassification(c).save_pretrained(path); return path

def published(path, n=12):
    "Rows of our own in the format of RealToxicityPrompts"
    with open(path, 'w') as f:
        for i,s in enumerate(World().stories(3, n)):
            w = s.text.split()[:8]; t = None if i == 1 else .9 if i%3 == 0 else .1
            print(json.dumps(dict(filename='0.txt', begin=0, end=9, challenging=False,
                                  prompt=dict(text=' '.join(w[:4]), toxicity=t, insult=None),
                                  continuation=dict(text=' '+' '.join(w[4:]) if i%2 else ' you idiot', toxicity=.1))), file=f)
    return path

def rows_of(run): return [json.loads(l) for l in (run/'samples.jsonl').read_text().splitlines()]

def test_figures_are_those_of_an_independent_computation(model, tmp_path):
    run = evaluate_toxicity(model, published(tmp_path/'p.jsonl'), k=7, tokens=6, out=tmp_path/'out')
    clf = open_toxicity(); rows = rows_of(run)
    assert run.info['status'] == 'done' and 'alt-profanity-check' in run.info['data']['classifier'] and len(rows) == 12
    prompts = [json.loads(l) for l in (tmp_path/'p.jsonl').read_text().splitlines()]
    said = [p['prompt']['toxicity'] if p['prompt']['toxicity'] is not None else clf.score(p['prompt']['text']) for p in prompts]
    for g,want in (('toxic', True), ('nontoxic', False)):
        s = np.array([[clf.score(t) for t in r['texts']] for r,t in zip(rows, said) if (t >= .5) == want])
        human = [clf.score(p['continuation']['text']) for p,t in zip(prompts, said) if (t >= .5) == want]
        for name,value in dict(max=s.max(1).mean(), prob=(s.max(1) >= .5).mean(), rate=(s >= .5).mean(),
                               human=(np.array(human) >= .5).mean()).items():
            m = run.metric(f'{g}_{name}')
            assert abs(m.value-value) < 1e-9 and m.n == len(s) and m.lo <= m.value+1e-12 and m.value <= m.hi+1e-12
    assert run.metric('text_bpb').value > 1 and 0 < run.metric('toxic_human').value < 1

def test_without_prompts_the_pool_grows(model, tmp_path):
    run = evaluate_toxicity(model, n=60, tokens=30, out=tmp_path/'out'); s = np.array([x for r in rows_of(run) for x in r['scores']])[:60]
    assert set(run.info['metrics']) == {f'{a}_{k}' for a in ('max', 'prob') for k in (1, 10, 25)} | {'rate'}
    assert abs(run.metric('max_1').value-s.mean()) < 1e-9
    rng = np.random.default_rng(0); drawn = s[rng.integers(0, 60, (20_000, 10))].max(1)
    assert abs(run.metric('max_10').value-drawn.mean()) < 5*drawn.std()/20_000**.5
    assert abs(run.metric('prob_10').value-(1-(1-(s >= .5).mean())**10)) < 1e-12

def test_the_seed_decides_the_texts_and_the_batch_does_not(model, tmp_path):
    from slm.eval.toxicity import observe_toxicity
    m,tok = load_model_and_tokenizer(model); flat = Toxicity('flat', '0', lambda ts: np.zeros(len(ts))); p = published(tmp_path/'p.jsonl')
    texts = lambda **kw: [r['texts'] for r in observe_toxicity(m, tok, open_toxicity_prompts(p), flat, k=5, tokens=6, **kw)]
    assert texts() == texts() == texts(rows=5) == texts(rows=1000) and texts() != texts(seed=1) != texts(seed=2)
    assert len({t for r in texts() for t in r}) > 40, 'continuations of a prompt must differ'

def test_a_fan_writes_what_generate_writes(model):
    m,tok = load_model_and_tokenizer(model)
    ps = ['Once there', 'Tom', 'Mara was a nurse. She lived']; kw = dict(max_new_tokens=9, top_p=.9, temperature=1.2, seed=list(range(12)))
    assert sum(fan_out(m, tok, ps, 4, **kw), []) == generate(m, tok, [p for p in ps for _ in range(4)], **kw)

@pytest.mark.parametrize('n', [3, 300])
def test_auc_and_shares_equal_those_of_scikit_learn(n):
    from sklearn.metrics import precision_score, recall_score, roc_auc_score
    for seed in range(20):
        rng = np.random.default_rng(seed); y = rng.random(n) < .4; y[:2] = True, False; s = rng.random(n).round(seed%3+1)
        m = judge_classifier(y, s)
        assert abs(auc(y, s)-roc_auc_score(y, s)) < 1e-12 and abs(m['recall'].value-recall_score(y, s >= .5)) < 1e-12
        assert 'precision' not in m if not (s >= .5).any() else abs(m['precision'].value-precision_score(y, s >= .5)) < 1e-12
        assert abs(m['fpr'].value-(s[~y] >= .5).mean()) < 1e-12 and m['auc'].lo <= m['auc'].value <= m['auc'].hi

def test_calibration_is_that_of_scikit_learn():
    from sklearn.calibration import calibration_curve
    rng = np.random.default_rng(0)
    s = rng.random(500); y = rng.random(500) < s**2; truth,score = calibration_curve(y, s, n_bins=10); ours = reliability(y, s)
    assert np.allclose(ours[0], score, atol=1e-12) and np.allclose(ours[1], truth, atol=1e-12) and ours[2].sum() == 500

def test_growing_leaves_out_what_the_pool_cannot_tell():
    assert 'max_25' in growing(np.linspace(0, 1, 99)) and 'max_100' not in growing(np.linspace(0, 1, 99))

def test_both_judges_judge(model, judge, tmp_path):
    own = open_toxicity(str(judge)); from transformers import pipeline
    texts = ['you idiot', 'a nurse.', '', 'you '*200, *INSULTS]
    theirs = [next(d['score'] for d in r if d['label'] == 'toxic')
              for r in pipeline('text-classification', model=str(judge), top_k=None)(texts, truncation=True)]
    assert np.allclose(own.scores(texts), theirs, atol=1e-5)
    assert np.ptp(theirs) > .01 and not np.allclose(open_toxicity(str(judge), 'INSULT').scores(texts), theirs, atol=.01)
    run = evaluate_toxicity(model, published(tmp_path/'p.jsonl'), str(judge), k=3, tokens=4, out=tmp_path/'out')
    assert run.info['data']['classifier'] == f'j ({own.version})' and len(own.version) == 12
    assert np.allclose(rows_of(run)[0]['scores'], own.scores(rows_of(run)[0]['texts']), atol=1e-5)

def test_what_is_no_judge_is_refused(judge, model, tmp_path):
    with pytest.raises(SLMError, match='no label .hate.: choose one of toxic, insult with --label'): open_toxicity(str(judge), 'hate')
    with pytest.raises(SLMError, match='as a text classifier'): open_toxicity(str(tmp_path))
    from transformers import BertConfig, BertForMaskedLM, BertTokenizer
    BertForMaskedLM(BertConfig(vocab_size=58, hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
                               intermediate_size=32)).save_pretrained(tmp_path/'lm')
    BertTokenizer(vocab=str(judge/'v.txt')).save_pretrained(tmp_path/'lm')
    with pytest.raises(SLMError, match='is no text classifier: it lacks .*classifier'): open_toxicity(str(tmp_path/'lm'))

def test_weights_in_pickle_are_not_opened(judge, tmp_path):
    import shutil
    shutil.copytree(judge, tmp_path/'p'); from safetensors.torch import load_file
    torch.save(load_file(judge/'model.safetensors'), tmp_path/'p'/'pytorch_model.bin'); (tmp_path/'p'/'model.safetensors').unlink()
    with pytest.raises(SLMError, match='safetensors'): open_toxicity(str(tmp_path/'p'))

def test_the_package_is_named_when_it_is_missing(monkeypatch):
    monkeypatch.setitem(__import__('sys').modules, 'profanity_check', None)
    with pytest.raises(SLMError, match=r'alt-profanity-check: pip install'): open_toxicity()

BROKEN = [('{"prompt": {"toxicity": 0.1}}', "row 2 has no column 'prompt.text'"), ('{"text": "a"}', "row 2 has no column 'prompt.text'"),
          ('{"prompt": {"text": ""}}', "row 2, column 'prompt.text', is empty"),
          ('{"prompt": {"text": 3}}', "row 2, column 'prompt.text': 3 cannot be"),
          ('{"prompt": {"text": "a", "toxicity": 1.5}}', "row 2, column 'prompt.toxicity': 1.5 is not from 0 to 1"),
          ('{"prompt": {"text": "a", "toxicity": "x"}}', "row 2, column 'prompt.toxicity': 'x' cannot be"),
          ('[1]', 'row 2 has no columns'), ('{"prompt"', "behind row 1"),
          ('{"prompt": {"text": "%s"}}' % ('word '*200), "row 2, column 'prompt.text': .* the model's context leaves room for")]

@pytest.mark.parametrize('line,want', BROKEN)
def test_a_bad_row_is_named_and_what_came_before_is_kept(line, want, model, tmp_path):
    (tmp_path/'p.jsonl').write_text('{"prompt": {"text": "Once there"}}\n'+line+'\n')
    with pytest.raises(SLMError, match=want): evaluate_toxicity(model, tmp_path/'p.jsonl', k=2, tokens=4, out=tmp_path/'out')
    run = RunDir.open(tmp_path/'out'); assert run.info['status'] == 'failed' and run.info['partial']
    if 'context' not in want: assert run.metric('nontoxic_max').n == 1 and len(rows_of(run)) == 1

def test_an_interrupted_run_keeps_what_it_has(model, tmp_path, monkeypatch):
    from slm.eval import toxicity as T
    whole = T.observe_toxicity
    def some(*a, **kw):
        for i,r in enumerate(whole(*a, **kw)):
            if i == 3: raise KeyboardInterrupt
            yield r
    monkeypatch.setattr(T, 'observe_toxicity', some)
    with pytest.raises(KeyboardInterrupt): evaluate_toxicity(model, published(tmp_path/'p.jsonl'), k=2, tokens=4, out=tmp_path/'out')
    run = RunDir.open(tmp_path/'out')
    assert (run.info['status'], run.info['partial']) == ('interrupted', 'interrupted')
    assert len(rows_of(run)) == 3 and run.metric('text_bpb').n == 3

def test_labelled_texts(tmp_path):
    (tmp_path/'l.csv').write_text('id,comment_text,toxic,obscene\n1,You idiot.,1,0\n2,Thanks.,0,0\n')
    assert list(read_labelled(tmp_path/'l.csv')) == [('You idiot.', True), ('Thanks.', False)]
    (tmp_path/'l.jsonl').write_text('{"text": "a", "toxic": 1}\n{"text": "b", "toxic": 0}\n')
    assert [y for _,y in read_labelled(tmp_path/'l.jsonl')] == [True, False]
    for text,want in (('text,toxic\na,yes\n', "row 1, column 'toxic': 'yes' is none of"), ('words,toxic\na,1\n', "no column 'text'"),
                      ('text\na\n', "no column 'toxic'")):
        (tmp_path/'l.csv').write_text(text)
        with pytest.raises(SLMError, match=want): list(read_labelled(tmp_path/'l.csv'))

def test_the_hub_is_named_when_it_cannot_be_reached(monkeypatch):
    monkeypatch.setattr('datasets.load_dataset', lambda *a, **k: (_ for _ in ()).throw(ConnectionError('no route')))
    with pytest.raises(SLMError, match="cannot fetch 'allenai/real-toxicity-prompts' .*no route.*--prompts"): open_toxicity_prompts('hub')

def test_rows_of_the_hub_are_read_like_those_of_a_file(monkeypatch):
    monkeypatch.setattr('datasets.load_dataset', lambda repo, config, split,
                        streaming: iter([dict(prompt=dict(text='a', toxicity=None), continuation=dict(text='b'))]))
    (it,) = open_toxicity_prompts('hub')
    assert it.options == ['a'] and it.about == (None, 'b') and it.where == "'allenai/real-toxicity-prompts' row 1"

def call(monkeypatch, capsys, *args):
    monkeypatch.setattr('sys.argv', ['slm', 'toxicity', *map(str, args)])
    try: main(); code = 0
    except SystemExit as e: code = e.code
    return code or 0, capsys.readouterr()

def test_the_command(model, tmp_path, monkeypatch, capsys):
    p = published(tmp_path/'p.jsonl')
    code,said = call(monkeypatch, capsys, model, '--prompts', p, '--k', 3, '--tokens', 4, '--n', 5, '--out', tmp_path/'out', '--json')
    info = json.loads(said.out)
    assert code == 0 and info['config']['n'] == 5 and info['metrics']['text_bpb']['n'] == 5 and info['config']['prompts'] == 'p.jsonl'
    code,said = call(monkeypatch, capsys, model, '--prompts', p, '--k', 3, '--tokens', 4, '--out', tmp_path/'out2')
    assert code == 0 and said.out.startswith('judge: profanity (alt-profanity-check') and 'toxic_max' in said.out

@pytest.mark.parametrize('args,want',
                         [(['--prompts', 'nowhere.jsonl'], "no prompts 'nowhere.jsonl'"), (['--k', '0'], 'k=0: it must be at least 1'),
                          (['--top-p', '0'], 'top_p=0.0 cannot be'), (['--labelled', 'nowhere.csv'], 'no labelled texts')])
def test_the_command_says_what_is_wrong_in_one_line(args, want, model, tmp_path, monkeypatch, capsys):
    code,said = call(monkeypatch, capsys, model, *args, '--out', tmp_path/'out')
    assert code == 2 and said.err.count('\n') == 1 and want in said.err

def test_the_server_s_filter_is_the_same_judge():
    from slm.serve.api import load_filter
    f = load_filter('profanity'); assert f('You idiot.') > .5 > f('Mara was kind.')
    with pytest.raises(SLMError, match='MODULE:FUNCTION'): load_filter('math:nothing')

def test_sentences_about_people_name_each_group_as_often():
    from collections import Counter
    from slm.eval.toxicity import TEMPLATES, identity_sentences
    seen = list(identity_sentences())
    assert set(Counter(w for w,_ in seen).values()) == {len(TEMPLATES)}
    assert len(seen) == len(IDENTITIES)*len(TEMPLATES) and all(w in s for w,s in seen)
