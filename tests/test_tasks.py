"Questions with options in their published formats, what goes wrong with them, the harness's opinion of the same rows, and recited text."
import json, random, sys, tracemalloc
from difflib import SequenceMatcher
from pathlib import Path
import numpy as np, pytest
from hypothesis import given, strategies as st
from slm.cli import main
from slm.core import RunDir, SLMError
from slm.data.world import World, towns
from slm.eval import tasks as T
from slm.eval.pairs import open_causal
from slm.eval.tasks import (TASKS, Automaton, arc_rows, evaluate_harness, evaluate_memory, evaluate_task, harness_model, memorised,
    quiz_rows, town_tasks, with_shots)
from slm.model.pretrained import load_model_and_tokenizer

@pytest.fixture(scope='module')
def model(random_model): return random_model(512)

def lines(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True); path.write_text(''.join(json.dumps(r)+'\n' for r in rows)); return path

def published(folder, n=12):
    "Rows of our own under the published names"
    rng, sents = random.Random(0), [t for s in World(1).stories(8, n) for t in s.text.split('. ')[:4]]
    for name,kind in (('Test', 5), ('Train', 6)):
        arc = list(arc_rows(town_tasks(kind, 3)))
        lines(folder/f'ARC-Challenge/ARC-Challenge-{name}.jsonl', arc)
        lines(folder/f'ARC-Easy/ARC-Easy-{name}.jsonl',
              [r | dict(question=dict(stem=r['question'],
                                      choices=[dict(text=t, label=l)
                                               for t,l in zip(r['choices']['text'], r['choices']['label'])])) for r in arc])
    for name in ('val', 'train'):
        lines(folder/f'hellaswag_{name}.jsonl',
              [dict(ind=i, activity_label='Telling', ctx_a=f'[header] {rng.choice(sents)}. [title] {rng.choice(sents)}.',
                    ctx_b=rng.choice(['', 'the end']), endings=[f'[step] {rng.choice(sents)}.' for _ in range(4)],
                    label=rng.randrange(4)) for i in range(n)])
    for name in ('valid', 'train'):
        lines(folder/f'{name}.jsonl', [dict(goal=rng.choice(sents), sol1=rng.choice(sents), sol2=rng.choice(sents)) for _ in range(n)])
        (folder/f'{name}-labels.lst').write_text(''.join(f'{rng.randrange(2)}\n' for _ in range(n)))
    lines(folder/'lambada_test.jsonl', [dict(text=s.text.rstrip('.')) for s in World().stories(9, n)]); return folder

PUBLISHED = [t for t in TASKS if t != 'world']

@pytest.mark.parametrize('task', PUBLISHED)
@pytest.mark.parametrize('shots', [0, 2])
def test_each_benchmark_runs_on_its_published_format(task, shots, model, tmp_path):
    if task == 'lambada' and shots:
        with pytest.raises(SLMError, match='no training split'):
            evaluate_task(model, task, published(tmp_path), tmp_path/'out', shots=shots)
        return
    run = evaluate_task(model, task, published(tmp_path), tmp_path/'out', shots=shots); info = RunDir.open(run.path).info
    assert info['status'] == 'done' and set(info['metrics']) == ({'acc', 'ppl'} if task == 'lambada' else {'acc', 'acc_norm'})
    for k,m in info['metrics'].items(): assert m['n'] == (24 if 'arc' in task else 12) and m['lo'] <= m['value'] <= m['hi']
    if task != 'lambada':
        assert info['chance']['acc'] == {'piqa': .5, 'hellaswag': .25}.get(task, info['chance']['acc']) and 0 < info['chance']['acc'] <= .5

def test_both_shapes_of_arc_are_the_same_questions(tmp_path):
    published(tmp_path); a,b = (list(TASKS[t].read(quiz_rows(t, tmp_path))) for t in ('arc_easy', 'arc_challenge'))
    assert [(i.context, i.options, i.about) for i in a] == [(i.context, i.options, i.about) for i in b] and len(a) == 24

def test_the_world_asks_without_files(model, tmp_path):
    run = evaluate_task(model, out=tmp_path/'out', limit=20); assert run.metric('acc').n == 20 and 1/9 < run.info['chance']['acc'] < .5
    test,train = ([r['question'] for _,r in quiz_rows('world', None, split)] for split in (0, 1))
    assert len(test) > 900 and not set(test) & set(train)

ARC = dict(id='1', question='Who?', choices=dict(text=['a', 'b'], label=['A', 'B']), answerKey='A')
SWAG = dict(activity_label='a', ctx_a='b', ctx_b='', endings=['c', 'd', 'e', 'f'], label=0)
BROKEN = [
    ('arc_easy', 'a.jsonl', ARC | dict(answerKey='C'), "row 2, column 'answerKey': 'C' is none of A, B"),
    ('arc_easy', 'a.jsonl', {k: v for k,v in ARC.items() if k != 'choices'}, "row 2 has no column 'choices'"),
    ('arc_easy', 'a.jsonl', ARC | dict(question=dict(stem='Who?',
                                                     choices=[dict(text='a'), dict(text='b')])), "row 2 has no column 'label'"),
    ('arc_easy', 'a.jsonl', ARC | dict(choices=dict(text=['a', ''], label=['A', 'B'])), "column 'choices.text': option 2 is empty"),
    ('arc_easy', 'a.jsonl', ARC | dict(choices=dict(text=['a', 'b', 'c'], label=['A', 'B'])), "column 'choices': 3 texts and 2 labels"),
    ('arc_easy', 'a.jsonl', ARC | dict(choices='a b'), "column 'choices': it must have texts"),
    ('arc_easy', 'a.jsonl', ['Who?'], 'row 2 has no columns'),
    ('arc_easy', 'a.jsonl', ARC | dict(question='who '*600), "row 2, column 'choices A': .* context holds 512"),
    ('hellaswag', 'a.jsonl', SWAG | dict(label='4'), "row 2, column 'label': '4' is none of 0, 1, 2, 3"),
    ('hellaswag', 'a.jsonl', SWAG | dict(endings='c'), "row 2, column 'endings'"),
    ('hellaswag', 'a.jsonl', SWAG | dict(endings=['c', '[d]', 'e', 'f']), "row 2, column 'endings': option 2 is empty"),
    ('piqa', 'a.jsonl', dict(goal='a', sol1='b', label=0), "row 2 has no column 'sol2'"),
    ('piqa', 'a.jsonl', dict(goal='a', sol1='b', sol2='c', label=2), "row 2, column 'label': '2' is none of 0, 1"),
    ('lambada', 'a.jsonl', dict(text='alone'), "row 2, column 'text': it needs a last word")]
GOOD = dict(arc_easy=ARC, hellaswag=SWAG, piqa=dict(goal='a', sol1='b', sol2='c', label=1), lambada=dict(text='a b'))

@pytest.mark.parametrize('task,name,row,want', BROKEN)
def test_bad_rows_are_named_and_what_came_before_is_kept(task, name, row, want, model, tmp_path):
    with pytest.raises(SLMError, match=want):
        evaluate_task(model, task, lines(tmp_path/name, [GOOD[task], row, GOOD[task]]), tmp_path/'out')
    part = RunDir.open(tmp_path/'out')
    assert part.info['status'] == 'failed' and 'row 2' in part.info['partial'] and part.metric('acc').n == 1

def test_a_limit_ends_before_the_bad_row(model, tmp_path):
    data = lines(tmp_path/'a.jsonl', [ARC, ARC | dict(answerKey='C')])
    assert evaluate_task(model, 'arc_easy', data, tmp_path/'out', limit=1).metric('acc').n == 1

def test_labels_in_a_file_of_their_own(tmp_path):
    published(tmp_path)
    rows = [r for _,r in quiz_rows('piqa', tmp_path)]
    assert [r['label'] for r in rows] == (tmp_path/'valid-labels.lst').read_text().split()
    for text,want in (('0\n'*11, "row 12: 'valid-labels.lst' has only 11 labels"), ('0\n'*13, 'has 12 rows, .* 13')):
        (tmp_path/'valid-labels.lst').write_text(text)
        with pytest.raises(SLMError, match=want): list(quiz_rows('piqa', tmp_path))

def test_the_hub_is_named_when_it_cannot_be_reached(monkeypatch):
    monkeypatch.setattr('datasets.load_dataset', lambda *a, **k: (_ for _ in ()).throw(ConnectionError('no route')))
    with pytest.raises(SLMError, match="cannot fetch 'Rowan/hellaswag' .*no route.*--data"): quiz_rows('hellaswag', 'hub')

def test_rows_of_the_hub_are_read_like_those_of_a_file(monkeypatch, model, tmp_path):
    asked = []
    def hub(repo, config, split, streaming):
        asked.append((repo, config, split)); return iter(arc_rows(town_tasks(5 if split == 'test' else 6, 3)))
    monkeypatch.setattr('datasets.load_dataset', hub); published(tmp_path)
    a,b = (evaluate_task(model, 'arc_challenge', d, tmp_path/'out', shots=1).info['metrics'] for d in ('hub', tmp_path))
    assert a == b and sorted(asked) == [('allenai/ai2_arc', 'ARC-Challenge', 'test'), ('allenai/ai2_arc', 'ARC-Challenge', 'train')]

@pytest.mark.parametrize('args,want', [
    (['--task', 'arc'], 'unknown task'), (['--task', 'piqa'], 'needs its published files'),
    (['--task', 'world', '--data', 'x'], 'makes its own questions'),
    (['--task', 'world', '--lm-eval', 'piqa'], 'give one of them'), (['--shots', '2'], 'belong to --task'),
    (['--task', 'world', '--include-path', '.'], 'does not go with --task world'),
    (['--lm-eval', 'piqa', '--data', 'x'], 'does not go with --lm-eval'),
    (['--task', 'memorisation', '--shots', '1'], 'does not go with --task memorisation'),
    (['--task', 'world', '--limit', '0'], 'it must be 1 or more')])
def test_the_command_says_in_one_line_what_is_wrong(args, want, model, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr('sys.argv', ['slm', 'eval', str(model), *args, '--out', str(tmp_path/'out')])
    with pytest.raises(SystemExit) as e: main()
    err = capsys.readouterr().err; assert e.value.code == 2 and err.count('\n') == 1 and want in err and not (tmp_path/'out').exists()

def test_the_command_asks(model, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr('sys.argv',
                        ['slm', 'eval', str(model), '--task', 'piqa', '--data', str(published(tmp_path)), '--num-fewshot', '2', '--limit',
                         '5', '--out', str(tmp_path/'out')])
    with pytest.raises(SystemExit) as e: main()
    assert not e.value.code and 'n=5, chance 0.5' in capsys.readouterr().out and RunDir.open(tmp_path/'out').info['config']['shots'] == 2

def test_without_the_harness_one_line_says_how_to_get_it(model, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'lm_eval', None)
    with pytest.raises(SLMError, match=r"pip install -e '.\[eval\]'"): evaluate_harness(model, ['piqa'], out=tmp_path/'out')

# ---- recited text

def naive(texts, docs):
    return [max((SequenceMatcher(None, t, d, autojunk=False).find_longest_match().size for d in docs), default=0) for t in texts]

@given(*[st.lists(st.lists(st.integers(0, 3), max_size=12), min_size=1, max_size=5)]*2)
def test_longest_runs_are_those_of_brute_force(texts, docs):
    auto = Automaton(texts)
    for d in docs: auto.read(d)
    got = auto.longest(); assert [n for n,_ in got] == naive(texts, docs)
    for t,(n,end) in zip(texts, got): assert any(t[end-n:end] == d[i:i+n] for d in docs for i in range(len(d)-n+1)) or n == 0

@given(st.text('abc ', max_size=40), st.lists(st.text('abc ', max_size=40), max_size=4))
def test_longest_runs_by_searching_strings(text, docs):
    auto = Automaton([list(text.encode())])
    for d in docs: auto.read(list(d.encode()))
    want = max((n for n in range(len(text)+1) for i in range(len(text)-n+1) if any(text[i:i+n] in d for d in docs)), default=0)
    assert auto.longest()[0][0] == (want if docs else 0)

def test_memory_does_not_grow_with_the_corpus(model):
    m,tok = load_model_and_tokenizer(model); word = [s.text for s in World().stories(3, 40)]
    def peak(n):
        docs = lambda: (word[i%40]+f' {i}' for i in range(n)); tracemalloc.start()
        memorised(m, tok, docs, word, n=4, k=8, m=8); p = tracemalloc.get_traced_memory()[1]; tracemalloc.stop(); return p
    peak(300); small,large = peak(300), peak(3000); assert large < 1.2*small

def test_a_model_recites_what_it_has_read_too_often(tmp_path):
    from slm.train.pretrain import pretrain
    ps = towns(3, 20)[0]
    docs = [' '.join(ps[4*i:4*i+4]) for i in range(20)]; text = lines(tmp_path/'t.jsonl', [dict(text=d) for d in docs[:8]])
    run = pretrain(f'files:{text}', tmp_path/'run', steps=150, vocab_size=400, seq_len=128, batch_tokens=512, evals=1, samples=1, seed=0,
                   device='cpu', lr=.01, dropout=0., model=dict(n_layer=2, d_model=64))
    m,tok = load_model_and_tokenizer(run.path); res,floor = memorised(m, tok, lambda: docs[:8], docs[8:], n=8, k=24, m=8)
    assert res['recited_read'].value > .5 > res['recited_unread'].value
    assert res['run_read'].lo > floor['run_read'] == res['run_real'].value and floor['recited_read'] == res['recited_unread'].value
    ev = evaluate_memory(run.path, f'files:{text}', n=5, k=8, m=8)
    assert ev.info['config']['epochs'] > 10 and RunDir.open(run/'memory').info['status'] == 'done'
    with pytest.raises(SLMError, match='no document has 128 tokens'): evaluate_memory(run.path, f'files:{text}', tmp_path/'x', k=90, m=38)
    lines(tmp_path/'u.jsonl', [dict(text=d) for d in docs])
    with pytest.raises(SLMError, match='is not what'): evaluate_memory(run.path, f"files:{tmp_path/'u.jsonl'}", tmp_path/'x')
    assert not (tmp_path/'x').exists()

# ---- the harness

SPLITS = dict(arc_challenge=('ARC-Challenge/ARC-Challenge-Train', 'ARC-Challenge/ARC-Challenge-Test'),
              hellaswag=('hellaswag_train', 'hellaswag_val'), piqa=('piqa_train', 'piqa_valid'), lambada_openai=('lambada_test',)*2)

def own_data(folder):
    "The harness's own task files, pointed at our rows"
    import lm_eval; home, more = Path(lm_eval.__file__).parent/'tasks', folder/'yaml'; published(folder); more.mkdir()
    for s in ('train', 'valid'):
        lines(folder/f'piqa_{s}.jsonl', [r | dict(label=int(r['label'])) for _,r in T.labelled(folder/f'{s}.jsonl')])
    for task,(train,test) in SPLITS.items():
        path = next(home.glob(f'*/{task}.yaml')); split = 'validation' if task in ('hellaswag', 'piqa') else 'test'
        (more/f'{task}.yaml').write_text(f"include: {path}\ntask: our_{task}\ntag: null\ndataset_path: json\n"
                                         "dataset_name: null\ndataset_kwargs:\n  data_files:\n    train: "
                                         f"{folder}/{train}.jsonl\n    {split}: {folder}/{test}.jsonl\n")
    return more

@pytest.mark.slow
@pytest.mark.parametrize('task', SPLITS)
@pytest.mark.parametrize('shots', [0, 2])
def test_prompts_and_numbers_are_the_harness_s(task, shots, model, tmp_path):
    "Every context and every option character by character, as lm-eval's own task files make them; and its figures through our adapter"
    lm_eval = pytest.importorskip('lm_eval', reason="needs: pip install -e '.[eval]'"); from lm_eval.tasks import TaskManager
    if task == 'lambada_openai' and shots: pytest.skip('no training split')
    folder = own_data(tmp_path); mine = dict(lambada_openai='lambada').get(task, task); q = TASKS[mine]; m,tok,_ = open_causal(model, 'cpu')
    found = lm_eval.simple_evaluate(harness_model(m, tok), tasks=[f'our_{task}'], task_manager=TaskManager(include_path=str(folder)),
                                    num_fewshot=shots, bootstrap_iters=0)
    samples = sorted(found['samples'][f'our_{task}'], key=lambda s: s['doc_id']); items = list(q.read(quiz_rows(mine, tmp_path)))
    if shots: items = list(with_shots(items, list(q.read(quiz_rows(mine, tmp_path, 1))), shots, spare=q.spare))
    theirs = [[(a['arg_0'],
                a['arg_1']) for a in s['arguments'].values()] if isinstance(s['arguments'],
                                                                            dict) else [tuple(a) for a in s['arguments']] for s in samples]
    assert theirs == [[(it.context, o) for o in it.options] for it in items]
    run = evaluate_task(model, mine, tmp_path, tmp_path/'out', shots=shots); res = found['results'][f'our_{task}']
    assert abs(run.metric('acc').value-res['acc,none']) < 1e-9
    if task == 'lambada_openai': assert abs(run.metric('ppl').value/res['perplexity,none']-1) < 1e-4
    else: assert abs(run.metric('acc_norm').value-res['acc_norm,none']) < 1e-9

@pytest.mark.slow
def test_every_kind_of_request_is_answered_as_transformers_does(model, tmp_path):
    pytest.importorskip('lm_eval', reason="needs: pip install -e '.[eval]'")
    from lm_eval.models.huggingface import HFLM; from lm_eval.api.instance import Instance
    from transformers import PreTrainedTokenizerFast
    m,tok = load_model_and_tokenizer(model)
    ask = lambda kind, *args: [Instance(request_type=kind, doc={}, arguments=a, idx=i) for i,a in enumerate(args)]
    name = lambda i: tok.tok.id_to_token(i)
    fast = PreTrainedTokenizerFast(tokenizer_object=tok.tok, eos_token=name(tok.eot_id), bos_token=name(tok.bos_id),
                                   pad_token=name(tok.pad_id))
    lms = harness_model(m, tok), HFLM(pretrained=str(model), tokenizer=fast, device='cpu', batch_size=4, dtype='float32')
    stories = [s.text for s in World().stories(4, 12)]; long = ' '.join(stories)
    pairs = [(s[:60], s[60:90]) for s in stories]+[('', s[:50]) for s in stories]+[(long, ' and so on'), ('A cook ', 'sang.')]
    for kind,args in (('loglikelihood', pairs), ('loglikelihood_rolling', [(s,) for s in [stories[0], long]])):
        a,b = (np.array(getattr(lm, kind)(ask(kind, *args)), dtype=float) for lm in lms)
        assert abs(a-b).max() < 2e-3*(100 if 'rolling' in kind else 1), kind
    a,b = (lm.generate_until(ask('generate_until',
                                 *[(s[:80],
                                    dict(until=['. '], max_gen_toks=24, do_sample=False)) for s in stories])) for lm in lms); assert a == b

@pytest.mark.slow
def test_a_task_of_the_harness_becomes_a_run(model, tmp_path, monkeypatch, capsys):
    pytest.importorskip('lm_eval', reason="needs: pip install -e '.[eval]'"); folder = own_data(tmp_path)
    monkeypatch.setattr('sys.argv',
                        ['slm', 'eval', str(model), '--lm-eval', 'our_piqa,our_hellaswag', '--include-path', str(folder), '--num-fewshot',
                         '1', '--limit', '6', '--out', str(tmp_path/'out')])
    with pytest.raises(SystemExit) as e: main()
    run = RunDir.open(tmp_path/'out')
    assert not e.value.code
    assert run.info['status'] == 'done' and run.metric('our_piqa_acc').n == 6 and 'our_hellaswag_acc_norm' in capsys.readouterr().out
    assert (run.metric('our_piqa_acc').lo < run.metric('our_piqa_acc').value < run.metric('our_piqa_acc').hi
            or run.metric('our_piqa_acc').value in (0, 1))
    with pytest.raises(SLMError, match="knows no task 'nothing'"): evaluate_harness(model, ['nothing'], out=tmp_path/'x')
    with pytest.raises(SLMError, match='is no folder'): evaluate_harness(model, ['piqa'], tmp_path/'none', out=tmp_path/'x')
    (tmp_path/'hellaswag_val.jsonl').unlink()
    with pytest.raises(SLMError, match='the evaluation harness failed with our_hellaswag'):
        evaluate_harness(model, ['our_hellaswag'], folder, out=tmp_path/'x')
    assert not (tmp_path/'x').exists()
