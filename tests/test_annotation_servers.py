"Round trips through running servers: Label Studio and doccano, on this machine, in environments of their own."
import json, os, shutil, subprocess, sys, time, zipfile
from pathlib import Path
import pytest
from slm.core import SLMError
from slm.train.annotate import PreferenceStore, export_tasks, import_judgements, read_items

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT/'tests'/'data'
# of the user, not of this test session: the environments are kept
HOME = Path(os.environ.get('SLM_HOME') or Path.home()/'.cache'/'slm')/'tools'
sys.path.insert(0, str(ROOT/'tools'))
import annotation_servers as servers

pytestmark = pytest.mark.slow
httpx = pytest.importorskip('httpx')

ITEMS = read_items(DATA/'items.jsonl')

@pytest.fixture
def store(tmp_path):
    s = PreferenceStore(tmp_path/'prefs.db', seed=3); s.add_items(ITEMS); return s

def start(server):
    "The server's context, or a skip that says why it cannot be had"
    try: servers.python({servers.label_studio: 'label-studio', servers.doccano: 'doccano'}[server], HOME)
    except SLMError as e: pytest.skip(str(e))
    return server(HOME)

def said(store): return {(j['annotator'], j['item']): (j['choice'], j['shown'], j['comment']) for j in store.judgements()}

def keep(path, name):
    "Renew a fixture of the fast tests: SLM_FIXTURES=1"
    if os.environ.get('SLM_FIXTURES'): shutil.copy(path, DATA/name)

# ---- Label Studio

def side(s): return [dict(from_name='comparison', to_name='answer1,answer2', type='pairwise', value=dict(selected=s))]
TIE = [dict(from_name='other', to_name='prompt', type='choices', value=dict(choices=['tie']))]
NOTE = [dict(from_name='comment', to_name='prompt', type='textarea', value=dict(text=['hard to say']))]

def second_person(url):
    "A session of somebody who signs up"
    c = httpx.Client(base_url=url, follow_redirects=True, timeout=60); c.get('/user/signup')
    r = c.post('/user/signup/',
               data=dict(email='ben@example.org', password=servers.PASSWORD, csrfmiddlewaretoken=c.cookies['csrftoken'],
                         allow_newsletters='false', how_find_us='none'),
               headers=dict(Referer=f'{url}/user/signup/'))
    assert r.status_code == 200 and c.get('/api/current-user/whoami').json()['email'] == 'ben@example.org', r.text[:500]
    return c

def test_label_studio(store, tmp_path):
    with start(servers.label_studio) as url:
        def ours(code): # with the server's own Python, which has the SDK
            r = subprocess.run([servers.python('label-studio', HOME), '-c',
                                f'from slm.train.annotate import *\ns = PreferenceStore({str(store.path)!r})\n{code}'],
                               env=os.environ | dict(PYTHONPATH=str(ROOT)), capture_output=True, text=True)
            return (r.stdout or r.stderr).strip().splitlines()[-1]
        where = f'{url!r}, {servers.TOKEN!r}, "kites"'
        assert ours(f'print(push(s, {where}))') == '6' and ours(f'print(push(s, {where}))') == '0'      # twice: nothing new
        admin = httpx.Client(base_url=url, headers=dict(Authorization=f'Token {servers.TOKEN}'), timeout=60)
        me = admin.get('/api/current-user/whoami').json()['id']
        project = admin.get('/api/projects').json()['results']; assert [p['title'] for p in project] == ['kites']; pid = project[0]['id']
        tasks = sorted(admin.get('/api/tasks', params=dict(project=pid, fields='all', page_size=100)).json()['tasks'],
                       key=lambda t: t['id'])
        texts = {t['data']['slm_item']: t['data'] for t in tasks}
        # as we sent them
        for it in store.items(): d = texts[it.source]; assert [d['answer1'], d['answer2']] == [it.responses[k].text for k in d['slm_order']]
        ben = second_person(url)
        def annotate(who, n, result, **kw):
            r = who.post(f"/api/tasks/{tasks[n]['id']}/annotations/", json=dict(result=result, lead_time=4.5) | kw,
                         headers={'X-CSRFToken': who.cookies.get('csrftoken', ''), 'Referer': url})
            assert r.status_code == 201, r.text; return r.json()['id']
        for n,(result,
               kw) in enumerate([(side('left'), {}), (side('right')+NOTE, {}), (TIE, {}), (side('left'), dict(was_cancelled=True)),
                                 (side('left')+TIE, {}), ([], {})]): annotate(admin, n, result, **kw)
        again = [annotate(ben, n, side(s)) for n,s in enumerate(['right', 'right', 'left'])]
        r = ben.patch(f'/api/annotations/{again[2]}/', json=dict(result=side('right')),
                      headers={'X-CSRFToken': ben.cookies.get('csrftoken', ''), 'Referer': url}); assert r.status_code == 200, r.text
        other = ben.get('/api/current-user/whoami').json()['id']; assert other != me
        assert ours(f'print(pull(s, {where}))') == "{'new': 6, 'known': 0, 'cancelled': 1, 'unclear': 2}"
        assert ours(f'print(pull(s, {where}))') == "{'new': 0, 'known': 6, 'cancelled': 1, 'unclear': 2}"
        ids = {t['data']['slm_item']: n for n,t in enumerate(tasks)}
        by_task = {ids[i.source]: i for i in store.items()}; o = [t['data']['slm_order'] for t in tasks]
        a, b = f'label-studio:{me}', f'label-studio:{other}'; num = lambda n: by_task[n].id
        want = {(a, num(0)): (o[0][0], o[0], ''), (a, num(1)): (o[1][1], o[1], 'hard to say'), (a, num(2)): ('tie', o[2], ''),
                **{(b, num(n)): (o[n][1], o[n], '') for n in range(3)}}
        assert said(store) == want
        assert all(abs(j['seconds']-4.5) < .01 and abs(j['ended']-time.time()) < 600 for j in store.judgements())
        export = tmp_path/'label-studio.json'
        r = admin.get(f'/api/projects/{pid}/export', params=dict(exportType='JSON'))
        assert r.status_code == 200; export.write_bytes(r.content) # what a person downloads
        fresh = PreferenceStore(tmp_path/'fresh.db', seed=3); fresh.add_items(ITEMS)
        assert import_judgements(fresh, export, 'label-studio') == dict(new=6, known=0, cancelled=1, unclear=2) and said(fresh) == want
        rows = json.loads(export.read_text())
        for t in rows: # nothing in a fixture that changes by itself
            for an in t['annotations']: an.pop('unique_id', None)
        (tmp_path/'keep.json').write_text(json.dumps(rows, indent=1, ensure_ascii=False)+'\n')
        keep(tmp_path/'keep.json', 'label-studio.json')
        mini = tmp_path/'mini.json'; mini.write_bytes(admin.get(f'/api/projects/{pid}/export', params=dict(exportType='JSON_MIN')).content)
        with pytest.raises(SLMError, match='task 1 has no annotations: export as JSON'): import_judgements(fresh, mini, 'label-studio')
        assert 'refuses (401): check token' in ours(f'push(s, {url!r}, "{"b0b"*13}1", "kites")')
        assert "no project 'hats'" in ours(f'pull(s, {url!r}, {servers.TOKEN!r}, "hats")')
    assert 'is it running?' in ours(f'push(s, {where})')

# ---- doccano

def test_doccano(store, tmp_path):
    n, labels = export_tasks(store, tmp_path/'tasks.jsonl', 'doccano')
    with start(servers.doccano) as url:
        def login(name):
            c = httpx.Client(base_url=url+'/v1', timeout=60)
            key = c.post('/auth/login/', json=dict(username=name, password=servers.PASSWORD)).json()['key']
            return httpx.Client(base_url=url+'/v1', headers=dict(Authorization=f'Token {key}'), timeout=60)
        ann, ben = login('ann'), login('ben')
        def ok(r): assert r.status_code < 300, r.text[:500]; return r.json()
        def done(id): # wait for the task queue
            for _ in range(300):
                s = ok(ann.get(f'/tasks/status/{id}'))
                if s['ready']: return s
                time.sleep(.2)
            pytest.fail('the task queue did nothing for a minute')
        pid = ok(ann.post('/projects',
                          json=dict(name='kites', description='kites', guideline='', project_type='DocumentClassification',
                                    resourcetype='TextClassificationProject',
                                                 single_class_classification=True, collaborative_annotation=False, random_order=False,
                                                 tags=[])))['id']
        role = next(r['id'] for r in ok(ann.get('/roles')) if r['name'] == 'annotator')
        other = next(u['id'] for u in ok(ann.get('/users')) if u['username'] == 'ben')
        ok(ann.post(f'/projects/{pid}/members', json=dict(user=other, role=role)))
        r = ann.post(f'/projects/{pid}/category-type-upload', files=dict(file=('labels.json', labels.read_bytes())))
        assert r.status_code < 300, r.text
        types = {t['text']: t['id'] for t in ok(ann.get(f'/projects/{pid}/category-types'))}; assert set(types) == {'A', 'B', 'tie', 'skip'}
        up = ann.post('/fp/process/', files=dict(filepond=('tasks.jsonl', (tmp_path/'tasks.jsonl').read_bytes())))
        assert up.status_code == 200, up.text
        res = done(ok(ann.post(f'/projects/{pid}/upload',
                               json=dict(format='JSONL', task='DocumentClassification', uploadIds=[up.text.strip('"')], column_data='text',
                                         column_label='label', encoding='utf_8', delimiter=',')))['task_id'])
        assert not (res.get('result') or {}).get('error') and not res.get('error'), res
        examples = ok(ann.get(f'/projects/{pid}/examples', params=dict(limit=100)))['results']; assert len(examples) == n == 6
        order = {e['meta']['slm_item']: e['id'] for e in examples}; items = store.items(); o = [store.order(i, 'doccano') for i in items]
        def annotate(who, n, label):
            ok(who.post(f'/projects/{pid}/examples/{order[items[n].source]}/categories', json=dict(label=types[label])))
        for k,l in enumerate(['A', 'B', 'tie', 'skip', 'A']): annotate(ann, k, l)
        for k,l in enumerate(['B', 'B', 'A']): annotate(ben, k, l)
        ok(ben.post(f'/projects/{pid}/comments?example={order[items[1].source]}',
                    json=dict(text='hard to say', example=order[items[1].source])))
        id = ok(ann.post(f'/projects/{pid}/download', json=dict(format='JSONL', exportApproved=False)))['task_id']; done(id)
        r = ann.get(f'/projects/{pid}/download', params=dict(taskId=id))
        assert r.status_code == 200; export = tmp_path/'doccano.zip'; export.write_bytes(r.content)
    assert sorted(zipfile.ZipFile(export).namelist())[-2:] == ['ann.jsonl', 'ben.jsonl']
    assert import_judgements(store, export, 'doccano') == dict(new=8, known=0, cancelled=0, unclear=0)
    assert import_judgements(store, export, 'doccano')['known'] == 8
    want = {('doccano:ann', k+1): (c, o[k], '') for k,c in enumerate([o[0][0], o[1][1], 'tie', 'skip', o[4][0]])}
    want |= {('doccano:ben', k+1): (c, o[k], 'hard to say' if k == 1 else '') for k,c in enumerate([o[0][1], o[1][1], o[2][0]])}
    assert said(store) == want
    keep(export, 'doccano.zip')
