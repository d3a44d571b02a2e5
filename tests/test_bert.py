"Models that fill gaps: other people's checkpoints and scores, gaps in all kinds of rows, damaged folders, training that goes on."
import json, shutil
import numpy as np, pytest, torch
from hypothesis import given, settings, strategies as st
from safetensors.torch import load_file, save_file
from slm.core import SLMError, set_seed
from slm.data.tokenizer import Tokenizer, char_tokenizer, train_bpe
from slm.data.world import World
from slm.model.bert import (BERT, GAPS, STYLES, Gaps, bert_config, encoder_config, fill_mask, load_bert_and_tokenizer,
                            pseudo_log_likelihoods, text_frame, word_starts)
from slm.model.gpt import GPT, GPTConfig
import forked

TEXTS = ['The old man sat by the sea.', "She didn't say why.", 'A', 'Unbelievable, extraordinarily long words!', '  two  spaces ']

@pytest.fixture(scope='module')
def tok(): return train_bpe([s.text for s in World().stories(1, 300)]+TEXTS*3, 700).with_mask()

@pytest.fixture(scope='module')
def folder(tok, tmp_path_factory):
    set_seed(0); path = tmp_path_factory.mktemp('bert')/'m'
    BERT(encoder_config('1m', tok.vocab_size, 64, n_layer=2, d_model=64)).save_pretrained(path, tok)
    return path

def wordpiece(path):
    "A tokenizer as BERT has it, with [CLS] and [SEP] around a text, saved by transformers"
    import tokenizers as t
    from transformers import BertTokenizerFast
    tok = t.BertWordPieceTokenizer()
    tok.train_from_iterator([s.text for s in World().stories(1, 300)], vocab_size=400, show_progress=False)
    fast = BertTokenizerFast(tokenizer_object=t.Tokenizer.from_str(tok.to_str())); fast.save_pretrained(path); return fast

# ---- minicons, which is how others compute it

@pytest.mark.parametrize('word', [False, True])
@pytest.mark.parametrize('kind', ['ours', 'bert'])
def test_scores_are_those_of_minicons(kind, word, folder, tmp_path):
    from minicons.scorer import MaskedLMScorer
    from transformers import AutoModelForMaskedLM, AutoTokenizer, BertConfig, BertForMaskedLM
    if kind == 'bert':
        fast = wordpiece(tmp_path); set_seed(0)
        BertForMaskedLM(BertConfig(vocab_size=len(fast), hidden_size=48, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
                                   max_position_embeddings=64)).save_pretrained(tmp_path)
    path = tmp_path if kind == 'bert' else folder; model,tok = load_bert_and_tokenizer(path); fast = AutoTokenizer.from_pretrained(path)
    hf = AutoModelForMaskedLM.from_pretrained(path).eval()
    texts = [t for t in TEXTS if t.strip() == t]
    fast.batch_encode_plus = lambda *a, **kw: fast(*a, **kw)                     # minicons knows it from before transformers 5
    scorer = MaskedLMScorer(hf, 'cpu', tokenizer=fast)
    theirs = scorer.sequence_score(texts, reduction=lambda x: x.sum(0).item(), PLL_metric='within_word_l2r' if word else 'original')
    assert np.abs(pseudo_log_likelihoods(model, tok, texts, word)-theirs).max() < 1e-4

def test_scores_do_not_depend_on_their_company(folder):
    model,tok = load_bert_and_tokenizer(folder); alone = [pseudo_log_likelihoods(model, tok, [t])[0] for t in TEXTS]
    for budget in (1, 100, 10**6): assert np.allclose(pseudo_log_likelihoods(model, tok, TEXTS, budget=budget), alone, atol=1e-4)
    assert pseudo_log_likelihoods(model, tok, []).shape == (0,) and pseudo_log_likelihoods(model, tok, [''])[0] == 0
    with pytest.raises(SLMError, match='text 1 has'): pseudo_log_likelihoods(model, tok, ['a', 'word '*99])

# ---- gaps

@given(st.data())
@settings(deadline=None, max_examples=60)
def test_gaps_in_any_rows(tok, data):
    rows = data.draw(st.lists(st.lists(st.integers(0, tok.vocab_size-1), min_size=7, max_size=7), min_size=1, max_size=4))
    ids = np.array(rows); g = Gaps(tok, data.draw(st.floats(.01, .99)), data.draw(st.sampled_from(GAPS))); rng = np.random.default_rng(0)
    x,asked = g(ids, rng); assert x.shape == asked.shape == ids.shape and (x[~asked] == ids[~asked]).all()
    special = np.isin(ids, list(tok.special_ids.values())); assert not (asked & special).any()
    made = (x != ids) & (x != tok.mask_id); assert not np.isin(x[made], list(tok.special_ids.values())).any()

@pytest.mark.parametrize('unit', GAPS)
@pytest.mark.parametrize('share', [.05, .15, .4, .8])
def test_the_share_is_what_was_asked_for(tok, unit, share):
    rows = np.array([tok.encode(s.text)[:64] for s in World().stories(2, 200)]); g = Gaps(tok, share, unit); rng = np.random.default_rng(1)
    seen = [g.choose(rows, rng).mean() for _ in range(20)]; assert abs(np.mean(seen)-share) < .012

def test_words_of_other_tokenizers(tmp_path):
    fast = wordpiece(tmp_path); tok = Tokenizer.load(tmp_path); ids = tok.encode('unbelievable stories'); starts = word_starts(tok)[ids]
    assert [not fast.convert_ids_to_tokens(i).startswith('##') for i in ids] == starts.tolist() and starts.sum() == 2
    assert text_frame(tok) == ([fast.cls_token_id], [fast.sep_token_id]) and tok.with_mask() is tok

def test_letters_alone(tmp_path):
    tok = char_tokenizer(['some letters']).with_mask(); m = BERT(encoder_config('1m', tok.vocab_size, 32, n_layer=1, d_model=64)).eval()
    assert len(fill_mask(m, tok, 's[MASK]me', 3)[0]) == 3
    assert len(fill_mask(m, tok, '[MASK]', 10**6)[0]) == tok.vocab_size-len(tok.special_ids)

def test_a_user_cannot_write_a_gap_into_what_is_learned(tok):
    ids = tok.encode('a [MASK] b'); assert tok.mask_id not in ids and tok.decode(ids) == 'a [MASK] b'

# ---- folders

def test_what_is_damaged_is_named(folder, tmp_path):
    for change,says in ((lambda d: d.update(hidden_size='x'), 'whole number'), (lambda d: d.pop('num_hidden_layers'), 'lacks'),
                        (lambda d: d.update(model_type='t5'), 'fill gaps'), (lambda d: d.update(num_hidden_layers=3), 'weights'),
                        (lambda d: d.update(layer_types=['sliding_attention']*2), 'neighbours'),
                        (lambda d: d.update(norm_bias=True), 'norm_bias')):
        bad = shutil.copytree(folder, tmp_path/'bad', dirs_exist_ok=True); d = json.loads((folder/'config.json').read_text()); change(d)
        (bad/'config.json').write_text(json.dumps(d))
        with pytest.raises(SLMError, match=says): load_bert_and_tokenizer(bad)
    (bad/'config.json').write_text((folder/'config.json').read_text()); (bad/'model.safetensors').write_bytes(b'x'*100)
    with pytest.raises(SLMError): load_bert_and_tokenizer(bad)
    with pytest.raises(SLMError, match='not a folder'): BERT.from_pretrained(folder/'config.json')

def test_a_model_that_writes_is_no_model_that_fills(folder, tmp_path, tok):
    GPT(GPTConfig(vocab_size=tok.vocab_size, n_layer=1, d_model=64)).save_pretrained(tmp_path/'gpt', tok)
    with pytest.raises(SLMError, match='fill gaps'): load_bert_and_tokenizer(tmp_path/'gpt')
    with pytest.raises(SLMError, match='slm fill'): GPT.from_pretrained(folder)

def test_old_names_and_other_heads(tmp_path):
    "gamma and beta, a pooler, a head for the next sentence, the decoder stored twice: as Google's first checkpoints have it"
    from transformers import BertConfig, BertForPreTraining
    set_seed(0)
    hf = BertForPreTraining(BertConfig(vocab_size=60, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48,
                                                    max_position_embeddings=16)).eval(); hf.save_pretrained(tmp_path)
    old = lambda k: k.replace('LayerNorm.weight', 'LayerNorm.gamma').replace('LayerNorm.bias', 'LayerNorm.beta')
    sd = {old(k): v.clone() for k,v in hf.state_dict().items()}
    save_file(sd, tmp_path/'model.safetensors'); x = torch.randint(60, (2, 9)); types = torch.randint(2, x.shape)
    ours = BERT.from_pretrained(tmp_path)(x, types=types)
    assert (ours-hf(input_ids=x, token_type_ids=types).prediction_logits).abs().max() < 1e-4

@pytest.mark.parametrize('over', [dict(n_types=0), dict(n_types=1), dict(act='relu'), dict(norm='rms'), dict(n_kv_head=1), dict(tied=False),
                                  dict(pos='rope'), dict(qk_norm=True), dict(bias=False)])
@pytest.mark.parametrize('style', STYLES)
def test_every_switch_comes_back(style, over, tmp_path):
    set_seed(0); m = BERT(encoder_config('1m', 50, 16, style, n_layer=1, d_model=64, n_head=2, **over)).eval()
    for p in m.parameters(): p.data += .1*torch.randn_like(p)
    m.save_pretrained(tmp_path); x = torch.randint(50, (2, 9)); same = BERT.from_pretrained(tmp_path)
    assert torch.equal(m(x), same(x)) and set(load_file(tmp_path/'model.safetensors'))
    if json.loads((tmp_path/'config.json').read_text())['model_type'] != 'slm':
        from transformers import AutoModelForMaskedLM
        assert (AutoModelForMaskedLM.from_pretrained(tmp_path).eval()(input_ids=x).logits-m(x)).abs().max() < 1e-4

def test_config_of_anything():
    for d in ({}, dict(model_type='bert'), dict(model_type='modernbert', vocab_size=5), dict(model_type='roberta', vocab_size='a'),
              dict(model_type='slm'), dict(model_type=['bert'])):
        with pytest.raises(SLMError): bert_config(d)

# ---- training

FEW = dict(vocab_size=512, seq_len=64, batch_tokens=1024, steps=8, evals=2, samples=1, save_minutes=1e-9, model=dict(n_layer=1, d_model=64))

@pytest.fixture(scope='module')
def corpus(tmp_path_factory):
    d = tmp_path_factory.mktemp('text'); (d/'a.txt').write_text('\n\n'.join(s.text for s in World().stories(3, 1500)))
    return f'files:{d}/a.txt'

@pytest.mark.parametrize('style', STYLES)
def test_interrupted_it_ends_where_it_would_have_ended(style, corpus, tmp_path):
    from slm.exp.bert import bert
    from slm.train.stage import resume
    from test_cli import Killed
    class Kill(__import__('fastai.callback.core', fromlist=['Callback']).Callback):
        order = 200
        def after_batch(self):
            if self.opt_steps == 5: raise Killed()
    more = FEW | dict(style=style, unit='span', share=.2, dropout=.1)
    bert(corpus, tmp_path/'whole', **more)
    with pytest.raises(Killed): bert(corpus, tmp_path/'cut', cbs=[Kill()], **more)
    resume(tmp_path/'cut'); a,b = (load_file(tmp_path/n/'model.safetensors') for n in ('whole', 'cut'))
    assert all(torch.equal(a[k], b[k]) for k in a)

def test_command_line(corpus, tmp_path):
    few = ('--steps', 3, '--vocab-size', 512, '--seq-len', 64, '--batch-tokens', 1024)
    r = forked.run('bert', '--corpus', corpus, *few, '--out', tmp_path/'b'); assert r.returncode == 0, r.stderr
    r = forked.run('fill', tmp_path/'b', 'The [MASK] sat on [MASK].', '-k', 2, '--json')
    assert [len(g) for g in json.loads(r.stdout)[0]] == [2, 2]
    r = forked.run('fill', tmp_path/'b', 'One.', 'Two.', '--score'); assert len(r.stdout.splitlines()) == 2
    for args in (('fill', tmp_path/'b', 'nothing'), ('generate', tmp_path/'b', '--prompt', 'x'), ('bert', '--share', 1.5),
                 ('bert', '--unit', 'x'), ('bert', '--style', 'x', '--steps', 1), ('fill', tmp_path, 'a [MASK]'),
                 ('bert', '--mixer', 'mamba', '--steps', 1, '--corpus', corpus)):
        r = forked.run(*args, '--out', tmp_path/'no') if args[0] == 'bert' else forked.run(*args)
        assert r.returncode == 2 and len(r.stderr.strip().splitlines()) == 1, (args, r.stderr)

# ---- found by reading

def test_scripts_without_spaces():
    text = ['\u6211\u4eec\u559c\u6b22\u8bfb\u4e66\u3002\u4eca\u5929\u5929\u6c14\u5f88\u597d\u3002',
            'left\u2014quickly \u201espazieren\u201c caf\u00e9s',
            '\u0e20\u0e32\u0e29\u0e32\u0e44\u0e17\u0e22']
    tok = char_tokenizer(text).with_mask(); starts = [word_starts(tok)[tok.encode(t)] for t in text]
    assert starts[0].all() and starts[2].sum() >= 5
    assert [c for c,s in zip(text[1], starts[1]) if s] == ['\u2014', ' ', '\u201e', '\u201c', ' ']
    rows = np.array([tok.encode(text[0]*4)[:48]]); g = Gaps(tok, .3); rng = np.random.default_rng(0)
    assert .1 < np.mean([0 < g.choose(rows, rng).mean() < 1 for _ in range(50)])

def test_the_rest_of_a_word_at_the_edge_is_a_word_of_its_own(tok):
    rows = np.array([tok.encode(s.text)[:64] for s in World().stories(2, 200)]); starts = word_starts(tok)
    cut = np.array([r[k:k+20] for r in rows for k in [next(i for i in range(1, 40) if not starts[r[i]])]]); rng = np.random.default_rng(0)
    g = Gaps(tok, .5)
    second = starts[cut].argmax(1)
    a = np.concatenate([(c[:, 0] == c[np.arange(len(c)), second]) for c in (g.choose(cut, rng) for _ in range(5))])
    assert .4 < a.mean() < .6                                                    # independent of the word that follows

def test_spans_have_the_lengths_of_the_paper():
    from slm.model.bert import _lengths
    assert abs((_lengths*np.arange(1, 11)).sum()-3.8) < .01 and abs(_lengths.sum()-1) < 1e-9

def test_letters_are_words_of_letters():
    tok = char_tokenizer(['the old man sat']).with_mask(); set_seed(0)
    m = BERT(encoder_config('1m', tok.vocab_size, 32, n_layer=1, d_model=64)).eval()
    both = pseudo_log_likelihoods(m, tok, ['the old man', 'the']), [pseudo_log_likelihoods(m, tok, [w])[0] for w in ('the old man', 'the')]
    assert np.allclose(*both, atol=1e-4) and not np.isclose(both[0][0], pseudo_log_likelihoods(m, tok, ['the old man'], word=False)[0])
    ids = tok.encode('the'); x = torch.tensor([[tok.eot_id, *ids, tok.eot_id]]*3); want = 0.
    for i in range(3): x[i, i+1:4] = tok.mask_id; want += m(x)[i, i+1].log_softmax(-1)[ids[i]].item()
    assert abs(both[0][1]-want) < 1e-3

def test_what_no_tokenizer_takes_is_refused(folder, tok):
    model,tok = load_bert_and_tokenizer(folder)
    with pytest.raises(SLMError, match='half of a character'): pseudo_log_likelihoods(model, tok, ['a', 'b \udcff'])
    with pytest.raises(SLMError): fill_mask(model, tok, 'a [MASK] \udcff')
    assert len(fill_mask(model, tok, 'a [MASK]', 10**9)[0]) == tok.vocab_size-len(tok.special_ids)

def test_a_tokenizer_that_ends_nothing():
    import tokenizers
    t = tokenizers.Tokenizer(tokenizers.models.BPE(vocab={'a': 0, 'b': 1}, merges=[]))
    with pytest.raises(SLMError, match='ends a document'): Tokenizer(t).with_mask()

def test_folders_for_another_task(tmp_path):
    from transformers import BertConfig, BertForMaskedLM, BertForSequenceClassification, BertModel
    cfg = BertConfig(vocab_size=60, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48,
                     max_position_embeddings=16)
    for cls in (BertModel, BertForSequenceClassification):
        cls(cfg).save_pretrained(tmp_path/cls.__name__)
        with pytest.raises(SLMError, match='no head for gaps'): BERT.from_pretrained(tmp_path/cls.__name__)
    BertForMaskedLM(cfg).save_pretrained(tmp_path/'more'); f = tmp_path/'more'/'model.safetensors'
    save_file(load_file(f) | {'classifier.weight': torch.zeros(2, 32)}, f); BERT.from_pretrained(tmp_path/'more')
    for odd in ('logit_scale', 'other.qkv.weight', 'x.both.bias'):
        save_file(load_file(f) | {odd: torch.zeros(3)}, tmp_path/'odd.safetensors'); bad = shutil.copytree(tmp_path/'more', tmp_path/odd)
        shutil.copy(tmp_path/'odd.safetensors', bad/'model.safetensors')
        with pytest.raises(SLMError, match='unknown'): BERT.from_pretrained(bad)

@pytest.mark.parametrize('kind', ['roberta', 'xlm-roberta', 'camembert'])
def test_the_kin_of_roberta(kind, tmp_path):
    from transformers import AutoConfig, AutoModelForMaskedLM
    size = dict(vocab_size=60, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48, max_position_embeddings=18)
    set_seed(0); hf = AutoModelForMaskedLM.from_config(AutoConfig.for_model(kind, **size, pad_token_id=1)).eval()
    hf.save_pretrained(tmp_path)
    x = torch.randint(2, 60, (2, 9)); assert (BERT.from_pretrained(tmp_path)(x)-hf(input_ids=x).logits).abs().max() < 1e-4
    d = json.loads((tmp_path/'config.json').read_text()); (tmp_path/'config.json').write_text(json.dumps(d | dict(pad_token_id=0)))
    with pytest.raises(SLMError, match='pad_token_id'): BERT.from_pretrained(tmp_path)

def test_only_those_that_fill_gaps_are_said_to(tmp_path):
    for kind in ('hubert', 'albert', 'deberta-v2'):
        with pytest.raises(SLMError) as e: GPTConfig.from_hf(dict(model_type=kind, vocab_size=9))
        assert 'slm fill' not in str(e.value)

def test_a_tokenizer_saved_again_says_the_same(tmp_path):
    from transformers import AutoTokenizer
    fast = wordpiece(tmp_path/'a'); Tokenizer.load(tmp_path/'a').save(tmp_path/'b'); again = AutoTokenizer.from_pretrained(tmp_path/'b')
    said = lambda t, args: {k: list(v) for k,v in t(*args).items()}
    for args in (('The man',), ('The man', 'sat')): assert said(again, args) == said(fast, args)
    assert (again.unk_token, again.mask_token, again.chat_template) == (fast.unk_token, fast.mask_token, None)

def test_gaps_of_a_batch_do_not_depend_on_where_the_loader_stands(tok, corpus):
    from slm.data.corpus import build_corpus
    from slm.data.loaders import tokenize
    from slm.exp.bert import GapLoader
    data = tokenize(build_corpus(corpus), tok).train; dl = GapLoader(data, 4, 32, gaps=Gaps(tok)); n = len(dl)
    want = dl.at(1, 0); dl.epoch,dl.pos = 0,n; ahead = dl.one_batch(); dl.epoch,dl.pos = 1,0; got = next(iter(dl))
    for a in (ahead, got, dl.at(1, 0)): assert all(torch.equal(x, y) for x,y in zip(a[:3], want[:3]))
    assert not torch.equal(dl.at(0, 0)[2], want[2])

def test_odd_tables_of_sentences(tmp_path):
    from slm.exp.bert import fit_classifier, read_sentences
    f = tmp_path/'a.tsv'; f.write_text('sentence\tlabel\na\u2028b\x85c\t1\r\n'+'x'*140_000+'\t0\n', encoding='utf-8')
    texts,labels = read_sentences(f); assert labels == [1, 0] and len(texts[1]) == 140_000 and texts[0].startswith('a')
    f.write_text('sentence\tlabel\nx\t-1\n')
    with pytest.raises(SLMError, match='row 1: classes are'): read_sentences(f)
    with pytest.raises(SLMError, match='class -1'): fit_classifier(None, None, ['a']*40, [-1, 1]*20)

def test_a_word_that_is_cut_off_is_not_that_word(folder):
    from slm.exp.bert import word_places
    tok = Tokenizer.load(folder); text = 'It was so very extraordinarily good.'; n = len(tok.encode(' It was so very ext'))
    assert not word_places(tok, [text], ['extraordinarily'], room=n) and word_places(tok, [text], ['extraordinarily'])
