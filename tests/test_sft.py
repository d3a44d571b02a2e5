"""Conversations: what trl makes of the same rows and weights, shapes and
faults of the data, the loader's position, and a run that is cut off."""
import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from forked import run
from slm.core import RunDir, SLMError
from slm.data.tokenizer import Tokenizer, train_bpe
from slm.model.gpt import GPT, GPTConfig, lm_loss
from slm.model.generate import generate
from slm.model.pretrained import load_model_and_tokenizer
from fastai.callback.core import Callback
from slm.train.pretrain import resume
from slm.train.sft import *

TALK = [dict(messages=[dict(role='system', content='Be brief.'), dict(role='user', content=f'What is {a} and {b}?'),
                       dict(role='assistant', content=f'It is {a+b}.'),
                       dict(role='user', content='And one more?'),
                       dict(role='assistant', content=f'That makes {a+b+1}, I think.')]) for a in range(8) for b in range(5)]
ASKED = [dict(prompt=f'Say {w} twice.', completion=f'{w} {w}') for w in 'red green blue yellow black white grey brown pink gold'.split()*3]


@pytest.fixture(scope='module')
def base(tmp_path_factory):
    "A model with random weights, its tokenizer, and the folder that transformers opens"
    path = tmp_path_factory.mktemp('base')
    tok = train_bpe([m['content'] for r in TALK for m in r['messages']]+[r['prompt'] for r in ASKED], 300)
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=tok.vocab_size, n_layer=2, d_model=64, n_head=4, n_kv_head=2, max_seq_len=128)).eval()
    for p in model.parameters(): p.data = p.data*2 if p.ndim > 1 else p.data
    model.save_pretrained(path, tok); tok.save(path)
    return model, tok, path


def rows_file(path, rows):
    path.write_text('\n'.join(map(json.dumps, rows))+'\n'); return path


# ------------------------------------------------------------------ trl

def trainer(base, rows, tmp_path, **kw):
    trl, datasets = pytest.importorskip('trl'), pytest.importorskip('datasets')
    from transformers import AutoModelForCausalLM, AutoTokenizer
    hf = AutoModelForCausalLM.from_pretrained(base[2], dtype=torch.float32); ht = AutoTokenizer.from_pretrained(base[2])
    args = trl.SFTConfig(output_dir=str(tmp_path), use_cpu=True, report_to=[], per_device_train_batch_size=4, max_length=128, bf16=False,
                         fp16=False,
                         seed=0, dataloader_pin_memory=False, gradient_checkpointing=False, loss_type='nll', **kw)
    return trl.SFTTrainer(hf, args=args, train_dataset=datasets.Dataset.from_list(rows), processing_class=ht)


def ours(model, batch):
    "Our loss on the rows of a batch of trl's"
    ids, labels = batch['input_ids'], batch['labels']
    seqlens = None
    if 'position_ids' in batch:
        starts = (batch['position_ids'][0] == 0).nonzero()[:, 0].tolist(); ends = starts[1:]+[ids.shape[1]]
        seqlens = torch.tensor([[b-a for a,b in zip(starts, ends)]]); seqlens[0, -1] -= 1 # the last token predicts nothing
    y = labels[:, 1:]; m = y != -100
    return lm_loss(model(ids[:, :-1], None, seqlens), y.clamp(min=0), m)


def test_assistant_mask_and_loss_are_trls(base, tmp_path):
    model, tok, _ = base; t = trainer(base, TALK, tmp_path, assistant_only_loss=True)
    for row,r in zip(TALK, t.train_dataset):
        ids, mask = tok.chat(row['messages'])
        assert ids == r['input_ids'] and [i if m else -100 for i,m in zip(ids, mask)] == r['labels']
    for _,batch in zip(range(3), t.get_train_dataloader()):
        with torch.no_grad(): theirs = t.compute_loss(t.model.eval(), dict(batch)).item(); mine = ours(model, batch).item()
        assert abs(mine-theirs) < 1e-5, (mine, theirs)


def test_prompt_completion_loss_is_trls(base, tmp_path):
    rows = [dict(prompt=[dict(role='user', content=r['prompt'])],
                 completion=[dict(role='assistant', content=r['completion'])]) for r in ASKED]
    model, tok, _ = base; t = trainer(base, rows, tmp_path, completion_only_loss=True)
    for row,r in zip(ASKED, t.train_dataset):
        ids, mask = tok.chat(to_messages(row))
        assert ids == r['input_ids'] and [i if m else -100 for i,m in zip(ids, mask)] == r['labels']
    batch = next(iter(t.get_train_dataloader()))
    with torch.no_grad(): theirs = t.compute_loss(t.model.eval(), dict(batch)).item(); mine = ours(model, batch).item()
    assert abs(mine-theirs) < 1e-5, (mine, theirs)


def test_packed_loss_is_trls(base, tmp_path):
    "trl's best-fit packing marks the parts of its one long row by positions; so do our lengths"
    model, tok, _ = base; t = trainer(base, TALK, tmp_path, assistant_only_loss=True, packing=True)
    batch = next(iter(t.get_train_dataloader())); assert len(batch['input_ids']) == 1 and (batch['position_ids'] == 0).sum() > 4
    with torch.no_grad(): theirs = t.compute_loss(t.model.eval(), dict(batch)).item(); mine = ours(model, batch).item()
    assert abs(mine-theirs) < 1e-5, (mine, theirs)


# ------------------------------------------------------------------ packing and the loader

@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 64), min_size=1, max_size=200))
def test_pack_places_each_once(lens):
    lens = np.array(lens); rows = pack(lens, 64)
    assert sorted(i for r in rows for i in r) == list(range(len(lens))) and max(int(lens[r].sum()) for r in rows) <= 64
    assert sum(lens[a].sum()+lens[b].sum() <= 64 for k,a in enumerate(rows) for b in rows[:k]) == 0 # no two rows could be one


def test_rows_hold_what_the_template_says(base, tmp_path):
    model, tok, _ = base; data = load_chats(rows_file(tmp_path/'a.jsonl', TALK), tok, 128, val_frac=.2)
    dl = ChatLoader(data.train, 2, 256, pad_id=tok.pad_id); want = {tuple(tok.chat(r['messages'])[0]) for r in TALK}; seen = set()
    for x,y,m,lens in dl:
        for r in range(len(x)):
            at = 0
            for n in [n for n in lens[r].tolist() if n]:
                if m[r, at:at+n].any(): seen.add((*x[r, at:at+n].tolist(), y[r, at+n-1].item()))
                at += n
            assert at == 256
    left = len(dl._plan(0))%2 and len(dl._plan(0)[-1]) # a row that fills no batch is left for another epoch
    assert len(seen) == len(data.train)-left and seen <= want


def test_two_epochs_differ_and_repeat(base, tmp_path):
    tok = base[1]; data = load_chats(rows_file(tmp_path/'a.jsonl', TALK), tok, 128, val_frac=.2)
    order = lambda: [b[0].tolist() for b in dl]
    dl = ChatLoader(data.train, 2, 256); a, b = order(), order(); dl = ChatLoader(data.train, 2, 256)
    assert a != b and [order(), order()] == [a, b]


# ------------------------------------------------------------------ data at fault

@pytest.mark.parametrize('line, why', [
    ('{"prompt": "a"', 'line 2: it is not JSON'), ('[1]', 'line 2: it is not a JSON object'),
    ('{"text": "a"}', 'line 2: it has text: expected messages'),
    ('{"prompt": "a", "completion": ""}', 'line 2: a message is empty'), ('{"messages": []}', "line 2: 'messages' must be a list"),
    ('{"messages": [{"role": "user", "content": null}]}', "line 2: message 1 has no text"),
    ('{"conversations": [{"from": "cat", "value": "m"}]}', "'cat'"),
    (json.dumps(dict(prompt='a', completion='b '*400)), 'the context holds 64')])
def test_a_bad_row_is_named(base, tmp_path, line, why):
    good = [json.dumps(r) for r in ASKED]
    path = tmp_path/'rows.jsonl'; path.write_text('\n'.join([good[0], line, *good[1:]])+'\n')
    data = load_chats(path, base[1], 64, val_frac=.2)
    assert [w for w,_ in data.rejects] == ['line 2'] and why in data.says().replace('\n  ', ' ')
    with pytest.raises(SLMError) as e: load_chats(path, base[1], 64, strict=True)
    assert 'line 2' in str(e.value) and '\n' not in str(e.value)


def test_sources_that_cannot_be_read(base, tmp_path):
    for source,why in ((tmp_path/'none.jsonl', 'no file'), (tmp_path, 'not a regular file'), ('hf:nobody', 'write hf:OWNER/NAME')):
        with pytest.raises(SLMError, match=why): load_chats(source, base[1], 64)
    (tmp_path/'e.jsonl').write_text('\n')
    with pytest.raises(SLMError, match='no usable conversation .it is empty.'): load_chats(tmp_path/'e.jsonl', base[1], 64)
    (tmp_path/'b.json').write_text('{"a": 1}')
    with pytest.raises(SLMError, match='line 1: it has a: expected'): load_chats(tmp_path/'b.json', base[1], 64)
    (tmp_path/'c.parquet').write_bytes(b'PAR1 nothing'); (tmp_path/'d.jsonl').write_bytes(b'{"prompt": "\xff"}')
    for name,why in (('c.parquet', 'not a readable parquet file'), ('d.jsonl', 'not valid UTF-8.*--encoding')):
        with pytest.raises(SLMError, match=why): load_chats(tmp_path/name, base[1], 64)


def test_null_is_absent_where_two_data_sets_were_merged(base, tmp_path):
    import pyarrow as pa, pyarrow.parquet as pq
    rows = [dict(messages=to_messages(r), prompt=None, completion=None) for r in ASKED]
    rows += [dict(messages=None, system=None, prompt=f"{r['prompt']} Please.", completion=r['completion']) for r in ASKED]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path/'a.parquet')
    for source in (tmp_path/'a.parquet', rows_file(tmp_path/'a.jsonl', rows)):
        data = load_chats(source, base[1], 64)
        assert not data.rejects and len(data.train)+len(data.valid) == len(rows)


@pytest.mark.parametrize('n', [2, 3, 10, 48])
@pytest.mark.parametrize('same', [False, True], ids=['questions', 'one question'])
def test_two_rows_are_enough_to_hold_one_out(base, tmp_path, n, same):
    rows = rows_file(tmp_path/'a.jsonl', [dict(prompt='Same?' if same else f'Say {i}.', completion=f'It is {i}') for i in range(n)])
    a,b = (load_chats(rows, base[1], 64, val_frac=1e-9) for _ in 'ab') # by chance none is held out
    assert (len(a.train), len(a.valid)) == (n-1, 1) and a.fingerprint == b.fingerprint
    assert len(a.asked) == 1 and base[1].chat(a.asked[0])[0] == a.valid[0][0].tolist()
    c = load_chats(rows, base[1], 64, val_frac=1.) # or all of them are
    assert len(c.train) == n-1 and len(c.valid) == 1


def test_one_row_is_not_enough(base, tmp_path):
    with pytest.raises(SLMError, match='only one usable conversation'): load_chats(rows_file(tmp_path/'a.jsonl', ASKED[:1]), base[1], 64)


@pytest.mark.parametrize('spoil',
                         ['{"prompt": "Ha \\ud83d", "completion": "cut \\ud83d"}', '{"messages": [{"role": "tool", "content": "7"}]}',
                                   '{"prompt": "a", "completion": "b", "system": 7}'], ids=['half an emoji', 'role', 'system'])
def test_one_odd_row_is_left_out(base, tmp_path, spoil):
    path = rows_file(tmp_path/'a.jsonl', ASKED); path.write_text(path.read_text()+spoil+'\n')
    data = load_chats(path, base[1], 64)
    assert [w for w,_ in data.rejects] == [f'line {len(ASKED)+1}'] and len(data.train)+len(data.valid) == len(ASKED)


def test_an_encoding_is_kept_for_going_on(base, tmp_path):
    rows = tmp_path/'rows.jsonl'; rows.write_text('\n'.join(json.dumps(r) for r in ASKED), encoding='utf-16')
    with pytest.raises(SLMError, match='is UTF-16: give --encoding utf-16'): sft(base[2], rows, tmp_path/'no', steps=2)
    cut = sft(base[2], rows, tmp_path/'cut', cbs=[StopAfter(1)], steps=2, bs=4, evals=1, samples=1, encoding='utf-16')
    assert cut.info['status'] == 'interrupted' and resume(cut.path).info['status'] == 'done'


def test_the_same_question_is_on_one_side(base, tmp_path):
    rows = [dict(r, completion=f"{r['completion']} {i}") for i,r in enumerate(ASKED)]
    data = load_chats(rows_file(tmp_path/'a.jsonl', rows), base[1], 64, val_frac=.3)
    asked = {m[0]['content'] for m in data.asked}; text = base[1].decode(np.array(data.train.ids))
    assert asked and not any(a in text for a in asked)


# ------------------------------------------------------------------ the stage

class StopAfter(Callback):
    order = 85
    def __init__(self, n): self.n = n
    def after_batch(self): self.learn.interrupted = self.opt_steps==self.n


def test_a_run_that_was_cut_off_ends_the_same(base, tmp_path):
    from safetensors.torch import load_file
    rows = rows_file(tmp_path/'rows.jsonl', TALK+ASKED); kw = dict(steps=8, bs=4, micro_batch=2, evals=2, samples=1, row_len=128)
    whole = sft(base[2], rows, tmp_path/'whole', **kw)
    cut = sft(base[2], rows, tmp_path/'cut', cbs=[StopAfter(3)], **kw); assert cut.info['status'] == 'interrupted'
    cut = resume(cut.path); assert cut.info['status'] == whole.info['status'] == 'done'
    a, b = (load_file(r/'model.safetensors') for r in (whole, cut))
    assert all(torch.equal(a[k], b[k]) for k in a) and a.keys() == b.keys()
    assert whole.info['parent'] == base[2].name and whole.metric('valid_bpb').value < whole.metric('valid_bpb_before').value
    model, tok = load_model_and_tokenizer(whole.path)
    assert isinstance(generate(model, tok, [dict(role='user', content='Say red twice.')], max_new_tokens=8), str)
    rows.write_text(rows.read_text().replace('Say', 'Tell'))
    cut = sft(base[2], rows, tmp_path/'cut2', cbs=[StopAfter(3)], **kw); rows_file(rows, TALK)
    with pytest.raises(SLMError, match='has changed since'): resume(cut.path)


def test_bad_settings(base, tmp_path):
    rows = rows_file(tmp_path/'rows.jsonl', ASKED)
    for kw,why in ((dict(seq_len=4096), '--seq-len must be from 8'), (dict(steps=0), '--steps must be above 0'),
                   (dict(lr=3), '--lr must be'),
                   (dict(opt='sgd'), '--opt must be one of muon, adamw')):
        with pytest.raises(SLMError, match=why): sft(base[2], rows, tmp_path/'out', **kw)
    assert not (tmp_path/'out').exists()


# ------------------------------------------------------------------ the command line


def test_teach_and_talk_from_the_command_line(base, tmp_path):
    rows = rows_file(tmp_path/'rows.jsonl', ASKED+[dict(prompt='Say nothing.', completion='')])
    r = run('sft', base[2], '--data', rows, '--steps', 60, '--bs', 4, '--lr', '5e-3', '--out', tmp_path/'taught')
    assert r.returncode == 0
    assert 'valid_bpb_before' in r.stdout and '1 rows of rows.jsonl left out:\n  line 31: a message is empty' in r.stderr
    one = run('chat', tmp_path/'taught', '--message', 'Say red twice.', '--temperature', 0)
    assert one.returncode == 0 and one.stdout.strip() and one.stderr == ''
    two = run('chat', tmp_path/'taught', '--temperature', 0, '--max-new-tokens', 8, stdin='Say red twice.\nSay gold twice.\n')
    assert two.returncode == 0 and two.stdout.splitlines()[0] == one.stdout.splitlines()[0] and len(two.stdout.splitlines()) == 2
    long = run('chat', tmp_path/'taught', '--max-new-tokens', 8, stdin='Say red twice, and once more, please.\n'*12)
    assert long.returncode == 0 and 'no longer fit into the context' in long.stderr
    for args,why in ((('sft', base[2], '--data', rows, '--strict', '--out', tmp_path/'x'), 'line 31: a message is empty'),
                     (('sft', tmp_path/'nothing', '--out', tmp_path/'x'), 'does not exist'),
                     (('sft', base[2], '--data', rows, '--out', tmp_path/'taught'), 'already holds a run')):
        r = run(*args); assert r.returncode == 2 and why in r.stderr and r.stderr.count('\n') == 1 and not (tmp_path/'x').exists(), r.stderr
