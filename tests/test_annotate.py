"The preference store under attack, agreement against other programs, and real exports of Label Studio and doccano."
import json, os, random, signal, sqlite3, subprocess, sys, threading, time, zipfile
from pathlib import Path
import numpy as np, pytest
from slm.core import SLMError
from slm.train.annotate import *

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT/'tests'/'data'
ENV = os.environ | dict(PYTHONPATH=os.pathsep.join([str(ROOT), os.environ.get('PYTHONPATH', '')]))

def rows(n): return [dict(prompt=f'question {i}', responses=[f'good answer {i}', f'bad answer {i}']) for i in range(n)]

@pytest.fixture
def store(tmp_path): s = PreferenceStore(tmp_path/'prefs.db'); s.add_items(rows(20)); return s

# ---- nothing is lost

JUDGE = '''
import sys, itertools
from slm.train.annotate import PreferenceStore
store, who = PreferenceStore(sys.argv[1]), sys.argv[2]
items = store.items()
for n in itertools.count():
    if n%7 == 6: print('undo', store.undo(who).id, flush=True)
    else: print(store.judge(items[n%len(items)], n%2 if n%5 else 'tie', who, comment=f'{who} {n}'), f'{who} {n}', flush=True)
'''

def test_what_was_acknowledged_survives_a_kill(store):
    "Two processes judge in a loop and are killed (SIGKILL) at a random moment, five times over"
    rng, said = random.Random(0), {}
    for turn in range(5):
        ps = [(who,
               subprocess.Popen([sys.executable, '-c', JUDGE, str(store.path), who], stdout=subprocess.PIPE, text=True,
                                env=ENV)) for who in (f'ann{turn}', f'ben{turn}')]
        first = {who: p.stdout.readline() for who,p in ps}; time.sleep(rng.uniform(.02, .3))
        for _,p in ps: p.kill()
        for who,p in ps:
            lines = first[who]+p.stdout.read(); assert p.wait() == -signal.SIGKILL
            said[who] = [l.split(' ', 1) for l in lines[:lines.rfind('\n')].split('\n')]
    store.close(); again = PreferenceStore(store.path); history = again.judgements(history=True)
    assert again.db.execute('PRAGMA integrity_check').fetchone()[0] == 'ok'
    assert again.db.execute('PRAGMA foreign_key_check').fetchall() == []
    for who,lines in said.items():
        mine = [j for j in history if j['annotator'] == who]; assert len(mine) - len(lines) in (0, 1), 'more than what was under way'
        for j,(id,what) in zip(mine, lines):
            if id == 'undo': assert j['choice'] == 'undo' and j['item'] == int(what)
            else: assert (j['id'], j['comment']) == (int(id), what)
    assert sum(map(len, said.values())) > 20

def test_a_full_disk_loses_nothing_and_says_so(store):
    its = store.items(); store.judge(its[0], 0, 'ann')
    pages = store.db.execute('PRAGMA page_count').fetchone()[0]; store.db.execute(f'PRAGMA max_page_count={pages}')
    with pytest.raises(SLMError, match='full; nothing was written'):
        for it in its*50: store.judge(it, 1, 'ben', comment='x'*1000)
    n = len(store.judgements(history=True)); store.db.execute('PRAGMA max_page_count=100000')
    store.judge(its[1], 1, 'ann'); assert len(PreferenceStore(store.path).judgements(history=True)) == n+1

def test_a_read_only_store_is_one_line(store):
    store.db.execute('PRAGMA query_only=1')
    with pytest.raises(SLMError) as e: store.judge(store.items()[0], 0, 'ann')
    assert '\n' not in str(e.value) and 'readonly' in str(e.value) and 'prefs.db' in str(e.value)

def test_threads_share_a_store(store):
    its, faults = store.items(), []
    def work(who):
        try:
            for it in its: store.judge(it, 0, who)
            store.undo(who)
        except Exception as e: faults.append(e)
    ts = [threading.Thread(target=work, args=(f'w{i}',)) for i in range(4)]
    [t.start() for t in ts]; [t.join() for t in ts]
    assert not faults and [store.progress(f'w{i}') for i in range(4)] == [(19, 20)]*4

def test_a_rollback_leaves_the_store_usable(store):
    with pytest.raises(KeyboardInterrupt):
        with store.transaction(): store._record(store.items()[0], 0, 'ann'); raise KeyboardInterrupt
    assert store.judgements(history=True) == []; store.judge(store.items()[0], 0, 'ann'); assert len(store.judgements()) == 1

def test_the_module_is_light():
    code = ("import sys, slm.train.annotate; print([m for m in ('torch', 'ipywidgets', 'IPython', 'pandas', "
            "'label_studio_sdk') if m in sys.modules])")
    assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, env=ENV).stdout.strip() == '[]'

def test_order_is_fair_and_the_same_everywhere(store):
    its = [i for i in store.items()]
    other = PreferenceStore(store.path); assert all(store.order(i, 'ann') == other.order(i, 'ann') for i in its)
    firsts = [store.order(Item(0, str(i), [], [0, 1]), 'ann')[0] for i in range(4000)]; assert abs(np.mean(firsts)-.5) < 4*.5/4000**.5

# ---- agreement, against other programs

def labels(rng, n, k, who, missing):
    return [[None if rng.random() < missing else rng.choice(['a', 'b', 'tie'][:k]) for _ in range(who)] for _ in range(n)]

def test_kappa_is_scikit_learn_s():
    from sklearn.metrics import cohen_kappa_score
    rng = random.Random(1)
    for _ in range(300):
        k, n = rng.choice([2, 3]), rng.randrange(5, 60)
        a, b = zip(*labels(rng, n, k, 2, 0)); b = tuple(y if rng.random() < .5 else x for x,y in zip(a, b))
        if len({*a, *b}) > 1: assert abs(cohen_kappa(a, b, n_boot=10).value-cohen_kappa_score(a, b)) < 1e-12

def test_alpha_is_krippendorff_s():
    reference = pytest.importorskip('krippendorff', reason='needs: pip install krippendorff')
    rng, seen = random.Random(2), 0
    for _ in range(300):
        rows = labels(rng, rng.randrange(4, 40), rng.choice([2, 3]), rng.choice([2, 3, 5]), rng.choice([0, .2, .5]))
        code = lambda l: np.nan if l is None else ['a', 'b', 'tie'].index(l)
        if len({l for r in rows if sum(x is not None for x in r) > 1 for l in r if l is not None}) < 2: continue
        want = reference.alpha(reliability_data=np.array([[code(l) for l in r] for r in rows]).T, level_of_measurement='nominal'); seen += 1
        assert abs(krippendorff_alpha(rows, n_boot=10).value-want) < 1e-12
    assert seen > 250

def test_intervals_are_those_of_naive_resampling():
    "Drawing items again one by one, 2000 times, gives the same interval within Monte Carlo error"
    rng, r = np.random.default_rng(3), random.Random(3)
    a = [r.choice('AB') for _ in range(80)]; b = [x if r.random() < .7 else r.choice('ABt') for x in a]
    idx = [rng.integers(0, 80, 80) for _ in range(2000)]
    for f,name in ((lambda x, y: cohen_kappa(x, y, n_boot=1).value, 'kappa'),
                   (lambda x, y: krippendorff_alpha(list(zip(x, y)), n_boot=1).value, 'alpha')):
        lo, hi = np.percentile([f([a[i] for i in w], [b[i] for i in w]) for w in idx], [2.5, 97.5])
        m = cohen_kappa(a, b, n_boot=4000) if name == 'kappa' else krippendorff_alpha(list(zip(a, b)), n_boot=4000)
        assert abs(m.lo-lo) < .02 and abs(m.hi-hi) < .02 and m.lo < m.value < m.hi

def test_report_of_one_person_who_only_skips(store):
    for it in store.items(): store.judge(it, 'skip', 'ann', started=time.time()-2)
    table = store_report(store); assert '| skips | 20 |' in table and '| first shown wins | – |' in table and 'κ' not in table

# ---- real exports (tests/test_annotation_servers.py makes them)

def fixture_store(tmp_path):
    "The items that the exports were made from"
    s = PreferenceStore(tmp_path/'real.db', seed=3); s.add_items(read_items(DATA/'items.jsonl')); return s

def test_a_real_export_of_label_studio(tmp_path):
    s = fixture_store(tmp_path)
    assert import_judgements(s, DATA/'label-studio.json', 'label-studio') == dict(new=6, known=0, unclear=2, cancelled=1, foreign=0)
    assert import_judgements(s, DATA/'label-studio.json', 'label-studio') == dict(new=0, known=6, unclear=2, cancelled=1, foreign=0)
    tasks = {t['data']['slm_item']: t for t in json.loads((DATA/'label-studio.json').read_text())}; by = {i.id: i.source for i in s.items()}
    for j in s.judgements(): assert j['shown'] == tasks[by[j['item']]]['data']['slm_order'] == s.order(s.item(j['item']), 'label-studio')
    assert len(s.annotators()) == 2 and sum(j['choice'] == 'tie' for j in s.judgements()) == 1 and len(s.pairs()) == 5
    assert [j['comment'] for j in s.judgements() if j['comment']] == ['hard to say']

def test_a_real_export_of_doccano(tmp_path):
    s = fixture_store(tmp_path)
    assert import_judgements(s, DATA/'doccano.zip', 'doccano') == dict(new=8, known=0, unclear=0, cancelled=0, foreign=0)
    assert s.annotators() == ['doccano:ann', 'doccano:ben'] and [j['comment'] for j in s.judgements() if j['comment']] == ['hard to say']
    with zipfile.ZipFile(DATA/'doccano.zip') as z: z.extract('ben.jsonl', tmp_path) # one member's file, under a better name
    t = PreferenceStore(tmp_path/'t.db', seed=3)
    t.add_items([dict(prompt=i.prompt, responses=[r.text for r in i.responses], source=i.source) for i in s.items()])
    assert import_judgements(t, tmp_path/'ben.jsonl', 'doccano', 'Ben')['new'] == 3 and t.annotators() == ['Ben']
    assert [j['choice'] for j in t.judgements()] == [j['choice'] for j in s.judgements('doccano:ben')]

def test_a_damaged_zip_adds_nothing(tmp_path):
    s, real = fixture_store(tmp_path), (DATA/'doccano.zip').read_bytes()
    with zipfile.ZipFile(DATA/'doccano.zip') as z: at = z.getinfo('ben.jsonl').header_offset+60
    with zipfile.ZipFile(tmp_path/'empty.zip', 'w') as z: z.writestr('readme.txt', 'nothing')
    (tmp_path/'flipped.zip').write_bytes(real[:at]+bytes(b ^ 255 for b in real[at:at+20])+real[at+20:])
    (tmp_path/'cut.zip').write_bytes(real[:len(real)//2])
    for name,why in dict(flipped='is a damaged zip file', cut='cannot read|is not JSON|is a binary file',
                         empty='holds no .jsonl file').items():
        with pytest.raises(SLMError, match=why): import_judgements(s, tmp_path/f'{name}.zip', 'doccano')
    assert s.judgements(history=True) == []

def damaged():
    real = json.loads((DATA/'label-studio.json').read_text())
    n = next(n for n,t in enumerate(real) if n and any(a['result'] for a in t['annotations']))
    def but(f): t = json.loads(json.dumps(real)); f(t[n]); return json.dumps(t)
    first = lambda t: next(a for a in t['annotations'] if a['result'])
    return [(json.dumps(real)[:-40], 'not valid JSON'), ('{"a": 1}', 'must be a list of tasks'),
            (but(lambda t: t.pop('annotations')), f'task {n+1} has no annotations'),
            (but(lambda t: t.pop('data')), f'task {n+1} has no data'),
            (but(lambda t: t['data'].update(slm_item=['x'])), f'task {n+1}: item'),
            (but(lambda t: t['data'].update(slm_order='01')), f'task {n+1}: slm_order'),
            (but(lambda t: first(t).update(completed_by=[])), f'task {n+1}: an annotation is damaged'),
            (but(lambda t: first(t).update(result='left')), f'task {n+1}: an annotation is damaged'),
            (but(lambda t: first(t).update(lead_time=-1)), f'task {n+1}: an annotation is damaged'),
            (but(lambda t: first(t).update(lead_time='long')), f'task {n+1}: an annotation is damaged'),
            (but(lambda t: t.update(annotations=['x'])), f'task {n+1}: an annotation is damaged')]

@pytest.mark.parametrize('i', range(11))
def test_a_damaged_export_adds_nothing(i, tmp_path):
    text, why = damaged()[i]; s = fixture_store(tmp_path); (tmp_path/'export.json').write_text(text)
    with pytest.raises(SLMError) as e: import_judgements(s, tmp_path/'export.json', 'label-studio')
    assert why in str(e.value) and 'export.json' in str(e.value) and '\n' not in str(e.value) and s.judgements(history=True) == []

def test_an_import_that_the_database_refuses_half_way_adds_nothing(tmp_path):
    s = fixture_store(tmp_path)
    s.db.execute("CREATE TEMP TRIGGER full BEFORE INSERT ON main.judgements WHEN (SELECT count(*) FROM main.judgements) "
                 ">= 3 BEGIN SELECT RAISE(ABORT, 'no more'); END")
    with pytest.raises(SLMError, match='no more; nothing was written'): import_judgements(s, DATA/'label-studio.json', 'label-studio')
    assert s.judgements(history=True) == []

def test_a_doccano_zip_that_unpacks_to_gigabytes_is_refused_unread(tmp_path):
    s = fixture_store(tmp_path)
    with zipfile.ZipFile(tmp_path/'bomb.zip', 'w', zipfile.ZIP_DEFLATED) as z:
        with z.open('ann.jsonl', 'w', force_zip64=True) as f:
            for _ in range(1025): f.write(bytes(2**20))
    with pytest.raises(SLMError, match='unpacks to 1,025 MB'): import_judgements(s, tmp_path/'bomb.zip', 'doccano')

def test_another_program_s_database_stays_as_it_is(tmp_path):
    db = sqlite3.connect(tmp_path/'history.db')
    for q in ('CREATE TABLE items(id, url)', 'CREATE TABLE judgements(x)', 'PRAGMA user_version=1', "INSERT INTO items VALUES(1, 'u')"):
        db.execute(q)
    db.commit(); db.close(); before = (tmp_path/'history.db').read_bytes()
    for f in (lambda: PreferenceStore(tmp_path/'history.db'), lambda: slm('add', tmp_path/'history.db', DATA/'items.jsonl')):
        with pytest.raises(SLMError, match='database of something else'): f()
    assert (tmp_path/'history.db').read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ['history.db']

def test_a_store_made_before_application_ids_opens(store):
    store.db.execute('PRAGMA application_id=0'); store.close(); assert len(PreferenceStore(store.path).items()) == 20
# ---- what the tools and their users really send

def exported(s, **kw):
    "An export of Label Studio in which each item's left answer was chosen"
    from slm.train.annotate import tasks_for
    said = dict(completed_by=1, result=[dict(from_name='comparison', value=dict(selected='left'))], created_at='2026-01-02T03:04:05Z') | kw
    return [t | dict(annotations=[dict(said)]) for t in tasks_for(s, 'label-studio')]

def imported(s, tmp_path, tasks, name='export.json', format='label-studio', **kw):
    (tmp_path/name).write_text(json.dumps(tasks), **kw); return import_judgements(s, tmp_path/name, format)

@pytest.mark.parametrize('by,who',
                         [(None, 'label-studio:deleted'), (7, 'label-studio:7'), (dict(id=7, email='a@b'), 'label-studio:7'),
                          ('a@b', 'label-studio:a@b')])
def test_who_judged_may_be_a_number_an_object_or_nobody(tmp_path, by, who):
    s = fixture_store(tmp_path); n = len(s.items())
    assert imported(s, tmp_path, exported(s, completed_by=by))['new'] == n
    assert {j['annotator'] for j in s.judgements()} == {who}

def test_a_result_of_null_is_unclear(tmp_path):
    s = fixture_store(tmp_path); got = imported(s, tmp_path, exported(s, result=None))
    assert (got['new'], got['unclear']) == (0, len(s.items()))

def test_tasks_added_by_hand_are_skipped_and_counted(tmp_path):
    s = fixture_store(tmp_path); mine = dict(id=99, data=dict(text='made in the tool'), annotations=[dict(completed_by=1, result=[])])
    got = imported(s, tmp_path, [mine, *exported(s), mine])
    assert got['new'] == len(s.items()) and got['foreign'] == 2

def test_json_min_is_json(tmp_path):
    (tmp_path/'a').mkdir(); (tmp_path/'b').mkdir(); a,b = (fixture_store(tmp_path/k) for k in 'ab')
    whole = exported(a, lead_time=4.); tie = dict(from_name='other', value=dict(choices=['tie']))
    whole[0]['annotations'][0]['result'] = [tie, dict(from_name='comment', value=dict(text=['both fine']))]
    least = [dict(t['data'], id=i, annotator=1, annotation_id=i, lead_time=4., created_at='2026-01-02T03:04:05Z',
                  updated_at='2026-01-02T03:04:05Z',
                  **(dict(other='tie', comment='both fine') if not i else dict(comparison=[dict(selected='left')])))
                  for i,t in enumerate(whole)]
    assert imported(a, tmp_path, whole) == imported(b, tmp_path, least)
    plain = lambda s: [(j['item'], j['choice'], j['annotator'], j['comment']) for j in s.judgements()]
    assert plain(a) == plain(b) and plain(a)[0][1] == 'tie'

@pytest.mark.parametrize('name,data,format,why', [
    ('a.csv', b'id,prompt\n1,a\n', 'label-studio', 'is a CSV file: export as JSON'),
    ('a.csv', b'id,text\n', 'doccano', 'is a CSV file: export as JSONL'),
    ('a.json', None, 'label-studio', 'is a zip file: export as JSON')])
def test_other_kinds_of_export_are_named(tmp_path, name, data, format, why):
    import zipfile
    s = fixture_store(tmp_path)
    if data is None:
        with zipfile.ZipFile(tmp_path/name, 'w') as z: z.writestr('a.txt', 'b')
    else: (tmp_path/name).write_bytes(data)
    with pytest.raises(SLMError, match=why): import_judgements(s, tmp_path/name, format)

def test_a_zip_that_a_mac_packed_again(tmp_path):
    import zipfile
    from slm.train.annotate import tasks_for
    s = fixture_store(tmp_path); lines = ''.join(json.dumps(dict(t, label=['A']))+'\n' for t in tasks_for(s, 'doccano'))
    with zipfile.ZipFile(tmp_path/'a.zip', 'w') as z:
        z.writestr('export/ann.jsonl', lines); z.writestr('export/.DS_Store', b'\0\1')
        for n in ('__MACOSX/export/._ann.jsonl', '__MACOSX/ann.jsonl', 'export/._ann.jsonl'): z.writestr(n, b'\0\5\x16\7')
    assert import_judgements(s, tmp_path/'a.zip', 'doccano')['new'] == len(s.items())
    assert {j['annotator'] for j in s.judgements()} == {'doccano:ann'}

@pytest.mark.parametrize('version', [0, 1, 7])
def test_a_database_of_another_program_is_not_touched(tmp_path, version):
    db = sqlite3.connect(tmp_path/'other.db'); db.execute('CREATE TABLE items(id, name)'); db.execute(f'PRAGMA user_version={version}')
    db.commit(); db.close(); before = (tmp_path/'other.db').read_bytes()
    with pytest.raises(SLMError, match='a database of something else'): PreferenceStore(tmp_path/'other.db')
    assert (tmp_path/'other.db').read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ['other.db']

def test_odd_prompts_are_left_out_and_odd_items_named(tmp_path, capsys):
    rows = [dict(prompt='Q?'), dict(prompt=[dict(role='tool', content='7')]), dict(prompt='cut \ud83d'), dict(prompt=''),
            dict(prompt=[{'from': 'human', 'value': 'R?'}])]
    (tmp_path/'p.json').write_text(json.dumps(rows[:4]), encoding='utf-8-sig')
    assert read_items(tmp_path/'p.json', prompts=True) == rows[:1]
    err = capsys.readouterr().err; assert "'tool'" in err and 'half a character' in err and 'not empty' in err
    with pytest.raises(SLMError, match="'responses' must be"): read_items(tmp_path/'p.json')

# ---- the command line

def slm(*args):
    from typer.testing import CliRunner
    from slm.cli import app
    r = CliRunner().invoke(app, ['annotate', *map(str, args)])
    if r.exception and not isinstance(r.exception, SystemExit): raise r.exception
    assert r.exit_code == 0, r.output
    return r.output

def test_the_way_from_the_shell(tmp_path):
    "Items in, tasks out, a real export in, a report, and pairs that preference training reads"
    db = tmp_path/'prefs.db'
    assert slm('add', db, DATA/'items.jsonl') == '6 new · 0 known\n'
    assert slm('add', db, DATA/'items.jsonl', '--json') == '{"new": 0, "known": 6}\n'
    assert slm('export', db, tmp_path/'tasks.json').startswith('6 tasks in ') and '<Pairwise' in (tmp_path/'tasks.template.xml').read_text()
    got = json.loads(slm('import', db, DATA/'label-studio.json', '--json')); assert sum(got.values()) > 6
    report = slm('report', db); assert 'label-studio:' in report and json.loads(slm('report', db, '--json'))
    n = len(PreferenceStore(db).pairs()); assert slm('pairs', db, tmp_path/'pairs.jsonl').startswith(f'{n} pairs') and n > 0
    from slm.train.dpo import read_preferences
    a, b = read_preferences(tmp_path/'pairs.jsonl', strict=True), read_preferences(db, strict=True)
    assert a.fingerprint == b.fingerprint and len(a.pairs) == n

@pytest.mark.parametrize('args, why', [
    (('report', 'nowhere.db'), 'no store'), (('add', 'new.db', 'nowhere.jsonl'), 'no file'),
    (('import', 'prefs.db', 'bad.json'), "bad.json"),
    (('export', 'prefs.db', 'tasks.json', '--format', 'prodigy'), 'prodigy'),
    (('push', 'prefs.db', '--project', 'kites'), 'no access token'), (('pairs', 'prefs.db', 'p.jsonl'), 'nothing to train on')])
def test_faults_from_the_shell_are_one_line(tmp_path, monkeypatch, args, why):
    monkeypatch.chdir(tmp_path); monkeypatch.delenv('LABEL_STUDIO_API_KEY', raising=False)
    PreferenceStore('prefs.db').add_items(rows(2)); Path('bad.json').write_text('[{"id": 1')
    with pytest.raises(SLMError) as e: slm(*args)
    assert why in str(e.value) and '\n' not in str(e.value)
    assert not Path('new.db').exists() and not Path('p.jsonl').exists() and not Path('tasks.json').exists()
