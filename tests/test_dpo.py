"Preference optimisation against trl's DPOTrainer, a run that is interrupted and resumed, and files that cannot be used."
import copy, json
import pytest, torch
from slm.core import RunDir, SLMError, set_seed
from slm.data.tokenizer import train_bpe
from slm.data.world import World
from slm.model.gpt import GPT, GPTConfig
from slm.model.pretrained import load_model_and_tokenizer
from slm.train.dpo import *

@pytest.fixture(scope='module')
def pairs():
    return [Pair([dict(role='user', content=p.task.prompt)], p.chosen, p.rejected) for p in World(limit=20).preferences(3, 300)]

@pytest.fixture(scope='module')
def tok(): return train_bpe((s.text for s in World(limit=20).stories(1, 300)), 420)

def tiny(tok, seed=0, **kw):
    set_seed(seed)
    return GPT(GPTConfig(vocab_size=tok.vocab_size, max_seq_len=512,
                         **dict(dict(n_layer=2, d_model=64, n_head=2, n_kv_head=1), **kw))).eval()

def moved(model, by=.02):
    "A copy whose weights are somewhat different"
    set_seed(1); model = copy.deepcopy(model)
    with torch.no_grad():
        for p in model.parameters(): p += by*torch.randn_like(p)
    return model

def theirs(tmp, policy, ref, tok, pairs, **kw):
    "trl's trainer on exported models and pairs"
    pytest.importorskip('trl', reason='needs: pip install trl')
    import datasets, transformers
    from trl import DPOConfig, DPOTrainer
    for name,m in (('policy', policy), ('ref', ref)): m.save_pretrained(tmp/name, tok); tok.save(tmp/name)
    write_preferences(tmp/'pairs.jsonl', pairs)
    args = DPOConfig(output_dir=str(tmp/'out'), use_cpu=True, bf16=False, gradient_checkpointing=False, max_length=None, report_to='none',
                     save_strategy='no',
                     disable_tqdm=True, **dict(dict(per_device_train_batch_size=len(pairs)), **kw))
    hf = {n: transformers.AutoModelForCausalLM.from_pretrained(tmp/n, dtype=torch.float32) for n in ('policy', 'ref')}
    return DPOTrainer(hf['policy'], hf['ref'], args=args, processing_class=transformers.AutoTokenizer.from_pretrained(tmp/'policy'),
                      train_dataset=datasets.Dataset.from_list([json.loads(l) for l in (tmp/'pairs.jsonl').open()]))

def ours(policy, ref, tok, pairs, **kw):
    data = PairData(tok, pairs, 512); x,y,mask,_ = next(iter(PairValidLoader(data, len(pairs))))
    logps = completion_logps(policy(x), y, mask)
    return *dpo_loss(logps, answer_logps(ref, data).T.flatten(), mask.sum(1), **kw), logps

@pytest.mark.parametrize('kind,n,mine,trl', [
    ('sigmoid', 4, {}, {}), ('sigmoid_norm', 4, {}, {}), ('ipo', 4, {}, {}),
    ('robust', 4, dict(label_smoothing=.1), dict(label_smoothing=.1)),
    ('sigmoid', 1, dict(label_smoothing=.1), dict(label_smoothing=.1, loss_type='aot'))]) # of one pair, trl's 'aot' is the smoothed sigmoid
def test_loss_and_rewards_are_trl_s(kind, n, mine, trl, tok, pairs, tmp_path):
    "Within 1e-5, relative to what is above 1 (a log-probability of a long answer is some hundreds of nats)"
    ref = tiny(tok); policy = moved(ref); some = pairs[:n]; beta = .3
    t = theirs(tmp_path, policy, ref, tok, some, beta=beta, **dict(dict(loss_type=kind), **trl)); t.model.train()
    batch = next(iter(t.get_train_dataloader())); want = t.compute_loss(t.model, batch); m = t._metrics['train']
    loss,rewards,logps = ours(policy, ref, tok, some, beta=beta, loss=kind, **mine); c,r = rewards.chunk(2)
    assert loss.item() == pytest.approx(want.item(), rel=1e-5, abs=1e-5) and abs(want.item()-.693) > .01
    got = {'rewards/chosen': c.mean(), 'rewards/rejected': r.mean(), 'rewards/margins': (c-r).mean(),
           'rewards/accuracies': (c > r).float().mean(),
           'logps/chosen': logps.chunk(2)[0].mean(), 'logps/rejected': logps.chunk(2)[1].mean()}
    for k,v in got.items(): assert v.item() == pytest.approx(m[k][-1], rel=1e-5, abs=1e-5), k
    policy.zero_grad(); loss.backward(); want.backward()
    theirs_grad = dict(t.model.named_parameters())
    for name,p in policy.named_parameters():
        assert torch.allclose(p.grad, theirs_grad[name].grad, rtol=1e-3, atol=1e-5*theirs_grad[name].grad.abs().max().item()+1e-7), name

# ---- the stage

@pytest.fixture(scope='module')
def base(tok, pairs, tmp_path_factory):
    "A folder with a model that has seen both kinds of answers"
    from fastai.data.core import DataLoaders
    from slm.train.learner import GradClip, LMLearner
    path = tmp_path_factory.mktemp('base'); data = PairData(tok, pairs, 512); model = tiny(tok)
    LMLearner(DataLoaders(PairLoader(data, 8), PairValidLoader(data, 8)), model, lr=4e-3, cbs=[GradClip()]).fit_steps(15)
    model.save_pretrained(path, tok); tok.save(path); write_preferences(path/'pairs.jsonl', pairs); return path

OPTS = dict(lr=1e-3, device='cpu', dtype='float32', evals=1, samples=1, max_rows=80)

def test_a_run_goes_on_where_it_was_interrupted(base, tmp_path):
    from fastai.callback.core import Callback
    from slm.train.pretrain import resume
    class StopAfter(Callback):
        order = 85
        def after_batch(self): self.learn.interrupted = self.opt_steps == 3
    opts = OPTS | dict(base=base, data=base/'pairs.jsonl', steps=12, bs=8)
    cut = dpo(out=tmp_path/'cut', cbs=[StopAfter()], **opts); assert cut.info['status'] == 'interrupted'
    cut,whole = resume(tmp_path/'cut'),dpo(out=tmp_path/'whole', **opts)                    # 72 pairs, 9 batches: the second epoch begins
    assert cut.info['status'] == whole.info['status'] == 'done'
    for k in ('likelier', 'accuracy', 'kl'): assert cut.metric(k).value == whole.metric(k).value, k
    assert whole.metric('kl').value > 0 and (whole/'preferences.png').exists() and '# Preferences' in (whole/'report.md').read_text()

def test_a_run_that_was_killed_before_its_mark_still_sees_the_doctor(base, tmp_path):
    from slm.train.stage import resume
    run = dpo(base, base/'pairs.jsonl', tmp_path/'run', steps=3, bs=8, **OPTS); said = run.info.pop('doctor')
    (run/'report.md').unlink(); run.info['status'] = 'running'; run.save()
    again = resume(run.path)
    assert again.info['status'] == 'done' and again.info['doctor'] == said and '# Preferences' in (run/'report.md').read_text()

def test_changed_pairs_are_not_resumed(base, pairs, tmp_path):
    from fastai.callback.core import Callback
    from slm.train.pretrain import resume
    class Stop(Callback):
        order = 85
        def after_batch(self): self.learn.interrupted = True
    write_preferences(tmp_path/'p.jsonl', pairs[:40]); dpo(base, tmp_path/'p.jsonl', tmp_path/'cut', steps=9, cbs=[Stop()], **OPTS)
    write_preferences(tmp_path/'p.jsonl', pairs[1:41])
    with pytest.raises(SLMError, match='has changed since'): resume(tmp_path/'cut')

def test_accumulated_batches_are_one_batch(base, tok, pairs, tmp_path):
    "The gradient of a step is the mean over pairs, whatever the lengths of their answers"
    runs = [dpo(base, base/'pairs.jsonl', tmp_path/f'{m}', steps=3, bs=8, micro_batch=m, **OPTS) for m in (8, 2)]
    a,b = (load_model_and_tokenizer(r.path)[0].state_dict() for r in runs); start = load_model_and_tokenizer(base)[0].state_dict()
    far = max((a[k]-start[k]).abs().max().item() for k in a); assert far > 1e-4
    for k in a: assert (a[k]-b[k]).abs().max().item() < .02*far, k

def test_minutes_are_kept(base, tmp_path):
    run = dpo(base, base/'pairs.jsonl', tmp_path/'run', minutes=.02, **OPTS)
    assert run.info['config']['steps'] >= 10 and run.metric('likelier_before').n == 8

def test_an_annotation_store_is_read(tmp_path):
    A = pytest.importorskip('slm.train.annotate'); store = A.PreferenceStore(tmp_path/'a.db')
    store.add_items([dict(prompt=[dict(role='user', content=f'{i}+{i}?')],
                          responses=[dict(text=str(2*i)), dict(text='no idea')]) for i in range(5)])
    A.judge_with(store, lambda m, texts: 'tie' if m[-1]['content'] == '0+0?' else texts.index('no idea') ^ 1, 'me'); store.close()
    p = read_preferences(tmp_path/'a.db', strict=True); assert len(p.pairs) == 4
    assert all(x.rejected == 'no idea' and x.prompt[0]['content'] == f'{int(x.chosen)//2}+{int(x.chosen)//2}?' for x in p.pairs)
    A.PreferenceStore(tmp_path/'empty.db').close()
    with pytest.raises(SLMError, match='it is empty'): read_preferences(tmp_path/'empty.db')

# ---- files of other people

GOOD = [dict(prompt=f'Q{i}: which one?', chosen=f'The red one, number {i}.', rejected='None.') for i in range(12)]
ODD = {'a role': dict(GOOD[0], prompt=[dict(role='user', content='Weather?'), dict(role='tool', content='{"t": 7}')]),
       'a system': dict(GOOD[0], system=dict(text='be brief')), 'half an emoji': dict(GOOD[0], chosen='cut \ud83d'),
       'a null': dict(GOOD[0], chosen=None)}

def rows_file(path, rows, **kw): path.write_text('\n'.join(map(json.dumps, rows))+'\n', **kw); return path

@pytest.mark.parametrize('odd', ODD)
def test_one_odd_row_is_left_out_with_its_reason(odd, base, tok, tmp_path, capsys):
    from slm.train.dpo import load_pairs
    source = rows_file(tmp_path/'a.jsonl', [*GOOD[:3], ODD[odd], *GOOD[3:]])
    c = DPOConfig(base=str(base), data=str(source), seq_len=256); prefs,train,valid = load_pairs(c, tok)
    assert [w for w,_ in prefs.rejects] == ['line 4'] and len(train)+len(valid) == len(GOOD)
    assert '1 rows of a.jsonl left out:\n  line 4: ' in capsys.readouterr().err
    with pytest.raises(SLMError, match='line 4'): read_preferences(source, strict=True)

def test_pairs_as_sharegpt_writes_them_and_other_people_s_roles(tmp_path):
    said = lambda who, text: {'from': who, 'value': text}
    rows = [dict(conversations=[said('human', r['prompt'])], chosen=said('gpt', r['chosen']),
                 rejected=said('gpt', r['rejected'])) for r in GOOD]
    rows[1]['prompt'] = rows[1]['system'] = None
    rows[2] = dict(GOOD[2], prompt=[dict(role='human', content=GOOD[2]['prompt'])], chosen=[dict(role='gpt', content=GOOD[2]['chosen'])])
    assert read_preferences(rows_file(tmp_path/'a.jsonl', rows), strict=True).pairs == [as_pair(r) for r in GOOD]

@pytest.mark.parametrize('encoding', ['utf-8-sig', 'utf-16', 'windows-1252'])
def test_pairs_in_any_encoding_that_is_named(tmp_path, tok, encoding):
    from slm.data.corpus import text_encoding
    rows = [dict(r, chosen='“Red”') for r in GOOD]
    (tmp_path/'a.json').write_text(json.dumps(rows, ensure_ascii=False), encoding=encoding)
    with text_encoding(encoding): assert [p.chosen for p in read_preferences(tmp_path/'a.json').pairs] == ['“Red”']*12

def test_a_shortened_prompt_keeps_its_template(tok):
    user = lambda s: dict(role='user', content=s); says = dict(role='assistant', content='Yes.')
    for chat in ([user('who '*300)],
                 [dict(role='system', content='Be brief.'), user('one '*90), says, user('two '*90), says, user('And now?')]):
        whole = tok.chat(chat, add_generation_prompt=True)[0]; e = encode_preference(tok, Pair(chat, 'Mara.', 'Tom.'), 64)
        head = '<|system|>Be brief.<|end|>'*(chat[0]['role'] == 'system')+'<|user|>'
        for ids in (whole, e.prompt): assert tok.decode(ids, False).replace('\n', '').startswith(head)
        assert e.prompt[-2:] == whole[-2:] and e.cut == len(whole)-len(e.prompt) > 0
        assert len(e.prompt)+len(e.chosen) <= 64
    assert tok.decode(e.prompt, False).count('<|user|>') == 1 # the older turns went as a whole

def test_a_pair_that_fits_nowhere_does_not_empty_the_held_out_side(tok):
    data = PairData(tok, [*map(as_pair, GOOD), as_pair(dict(GOOD[0], prompt='?', chosen='word '*400))], 128)
    assert len(data) == len(data.pairs) == 12 and len(data.rejects) == 1
    train,valid = map(data.part, split_pairs(data.pairs, .1)); assert (len(train), len(valid)) == (11, 1)

def test_prompts_longer_than_the_context_do_not_end_the_stage(base, tok, tmp_path):
    rows = [dict(r, prompt=f"{r['prompt']} "+'who has the kite? '*200) for r in GOOD]
    assert min(len(tok.chat([dict(role='user', content=r['prompt'])])[0]) for r in rows) > 512
    run = dpo(base, rows_file(tmp_path/'a.jsonl', rows), tmp_path/'run', steps=2, bs=4, **OPTS)
    assert run.info['status'] == 'done' and run.info['data']['prompts_cut'] == 12 and (run/'samples.md').exists()

@pytest.mark.slow
def test_trl_s_trainer_lands_where_ours_does(tok, pairs, tmp_path):
    "An SFT'd model, exported: the same pairs, rate, steps and batch give the same held-out accuracy, within its interval"
    pytest.importorskip('trl', reason='needs: pip install trl')
    from slm.train.sft import sft
    tiny(tok, n_layer=2, d_model=96).save_pretrained(tmp_path/'new', tok); tok.save(tmp_path/'new')
    many = [Pair([dict(role='user', content=p.task.prompt)], p.chosen, p.rejected) for p in World(limit=20).preferences(3, 600)]
    with (tmp_path/'chats.jsonl').open('w') as f:
        f.writelines(json.dumps(dict(messages=[*p.prompt, dict(role='assistant', content=p.chosen)]))+'\n' for p in many)
    base = sft(tmp_path/'new', tmp_path/'chats.jsonl', tmp_path/'sft', steps=80, bs=8, lr=3e-3, opt='muon', samples=1, evals=1,
               dtype='float32')
    train,valid = split_pairs(many, .2); write_preferences(tmp_path/'train.jsonl', train); held = PairData(tok, valid, 512)
    model,_ = load_model_and_tokenizer(base.path); n = 25; lr = 5e-4
    t = theirs(tmp_path, model, model, tok, train, per_device_train_batch_size=16, max_steps=n, learning_rate=lr, warmup_steps=3,
               weight_decay=0., adam_beta2=.95, beta=.1); t.train()
    t.model.save_pretrained(tmp_path/'trl'); tok.save(tmp_path/'trl')
    ours = dpo(base.path, tmp_path/'train.jsonl', tmp_path/'ours', steps=n, lr=lr, warmup=3, bs=16, beta=.1, samples=1, evals=1,
               dtype='float32')
    acc = {k: preference_accuracy(load_model_and_tokenizer(p)[0], model, held) for k,p in (('trl', tmp_path/'trl'), ('ours', ours.path))}
    print(acc)
    assert all(a.lo > .5 for a in acc.values())
    assert acc['trl'].lo <= acc['ours'].value <= acc['trl'].hi and acc['ours'].lo <= acc['trl'].value <= acc['ours'].hi
