"The form of the chapter on annotation, in a real browser: JupyterLab and Voilà, mouse and keys."
import contextlib, json, os, shutil, socket, subprocess, sys, time, urllib.request
from pathlib import Path
import pytest
from slm.train.annotate import PreferenceStore

ROOT = Path(__file__).resolve().parent.parent
TOKEN = 'only-on-this-machine'
NASTY = '<b id="bold">not bold</b> & <script>window.hacked = 1</script>\n  $x^2$ & "quoted"'
ROWS = [dict(prompt=f'Question {i}: where is the kite? <i>',
             responses=[dict(text=f'In the barn. {NASTY}', run='secret-run'), dict(text=f'I do not know ({i}).', run='other-run')])
        for i in range(1, 8)]

pytestmark = pytest.mark.slow

def free_port():
    with socket.socket() as s: s.bind(('127.0.0.1', 0)); return s.getsockname()[1]

def wait_for(f, seconds=60, what='it'):
    "The first true value of f()"
    t0 = time.time()
    while time.time()-t0 < seconds:
        with contextlib.suppress(OSError):
            if r := f(): return r
        time.sleep(.1)
    pytest.fail(f'waited {seconds} s for {what}')

def notebook(path, db):
    "A notebook that shows the form, and another cell below it"
    cell = lambda s: dict(cell_type='code', id=f'c{abs(hash(s))%10**8}', metadata={}, execution_count=None, outputs=[], source=s)
    md = dict(cell_type='markdown', id='text', metadata={}, source='Some text below.')
    src = f'from slm.train.annotate import PreferenceStore, Annotator\nAnnotator(PreferenceStore({str(db)!r}), "ann")'
    path.write_text(json.dumps(dict(cells=[cell(src), md],
                                    metadata=dict(kernelspec=dict(name='python3', display_name='Python 3', language='python')), nbformat=4,
                                    nbformat_minor=5)))

@contextlib.contextmanager
def server(kind, folder):
    "JupyterLab or Voilà on this machine; yields the page's address"
    port, env = free_port(), os.environ | dict(PYTHONPATH=os.pathsep.join([str(ROOT), os.environ.get('PYTHONPATH', '')]),
                                               JUPYTER_CONFIG_DIR=str(folder/'config'), JUPYTER_DATA_DIR=str(folder/'data'),
                                               JUPYTERLAB_SETTINGS_DIR=str(folder/'settings'),
                                               JUPYTERLAB_WORKSPACES_DIR=str(folder/'workspaces'), IPYTHONDIR=str(folder/'ipython'))
    if kind == 'lab':
        cmd = ['jupyterlab', '--no-browser', '--allow-root', '--ip=127.0.0.1', f'--port={port}', f'--IdentityProvider.token={TOKEN}',
               f'--ServerApp.root_dir={folder}', '--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate']
        url, ready = f'http://127.0.0.1:{port}/lab/tree/judge.ipynb?token={TOKEN}', f'http://127.0.0.1:{port}/api?token={TOKEN}'
    else:
        cmd = ['voila', str(folder/'judge.ipynb'), '--no-browser', f'--port={port}', '--Voila.ip=127.0.0.1']
        url = ready = f'http://127.0.0.1:{port}/'
    with open(folder/f'{kind}.log', 'w') as log, subprocess.Popen([sys.executable, '-m', *cmd], cwd=folder, env=env, stdout=log,
                                                                stderr=subprocess.STDOUT) as p:
        try:
            wait_for(lambda: urllib.request.urlopen(ready, timeout=60).status == 200, 90, f'{kind} (see {log.name})'); yield url
        finally: p.terminate()

@pytest.fixture(scope='module')
def browser():
    api = pytest.importorskip('playwright.sync_api', reason='needs: pip install playwright')
    chromium = next((p for n in ('chromium', 'chromium-browser', 'google-chrome') if (p := shutil.which(n))), None)
    if not chromium: pytest.skip('needs Chromium (Debian: apt install chromium)')
    with api.sync_playwright() as p:
        b = p.chromium.launch(executable_path=chromium, args=['--no-sandbox']); yield b; b.close()

@pytest.mark.parametrize('kind', ['lab', 'voila'])
def test_judging_by_mouse_and_keys(kind, browser, tmp_path):
    if kind == 'voila': pytest.importorskip('voila', reason='needs: pip install voila')
    store = PreferenceStore(tmp_path/'prefs.db'); store.add_items(ROWS); notebook(tmp_path/'judge.ipynb', tmp_path/'prefs.db')
    rows = lambda: [(j['item'], j['choice']) for j in store.judgements('ann', history=True)]
    with server(kind, tmp_path) as url:
        page = browser.new_page(viewport=dict(width=1100, height=900)); page.goto(url, timeout=90_000)
        if kind == 'lab':
            page.wait_for_selector('.jp-Notebook .jp-CodeCell', timeout=90_000); page.wait_for_timeout(2000)
            page.click('.jp-Notebook .jp-CodeCell .cm-content'); page.keyboard.press('Shift+Enter')
        page.wait_for_selector('.slm-key-1', timeout=90_000); form = page.locator('.slm-form')
        def at(n): form.get_by_text(f'Question {n}:').wait_for(timeout=20_000); page.wait_for_timeout(400) # longer than the form's pause
        at(1); seen = form.inner_text()
        assert 'window.hacked' in seen
        assert '<b id="bold">' in seen and '$x^2$' in seen and page.evaluate('window.hacked') is None and page.locator('#bold').count() == 0
        assert 'secret-run' not in page.content() and 'other-run' not in page.content()
        items = store.items(); o = [store.order(i, 'ann') for i in items]
        first = [form.locator('.slm-text').nth(k).inner_text() for k in (1, 2)]
        assert [t.split()[0] for t in first] == [items[0].responses[k].text.split()[0] for k in o[0]]
        form.locator('.slm-key-2').click(); at(2)                                            # the right one, by mouse
        page.keyboard.press('1'); at(3)                                                      # the focus is in the form: keys work
        page.keyboard.press('3'); at(4); page.keyboard.press('s'); at(5)
        page.keyboard.press('u'); at(4)                                                      # taken back
        box = form.get_by_placeholder('comment'); box.click(); box.press_sequentially('1 u s'); page.wait_for_timeout(500)
        assert len(rows()) == 5 and 'Question 4' in form.inner_text()                        # typing is not judging
        form.locator('.slm-text').first.click(); page.keyboard.press('2'); at(5)             # a click on the text brings the focus back
        # a key held down is one press
        page.keyboard.down('1'); [page.keyboard.down('1') for _ in range(5)]; page.keyboard.up('1'); at(6); assert len(rows()) == 7
        page.keyboard.press('Control+1'); page.keyboard.press('7'); page.wait_for_timeout(500); assert len(rows()) == 7
        page.keyboard.press('1'); at(7); page.keyboard.press('S')
        form.get_by_text('All 7 items are judged').wait_for(timeout=20_000); page.wait_for_timeout(400)
        page.keyboard.press('1'); page.wait_for_timeout(500)
        # no shortcut of Lab's went off
        if kind == 'lab': assert page.locator('.jp-Notebook .jp-Cell').count() >= 2 and not page.locator('.jp-MarkdownCell h1').count()
        page.close()
    want = [(1, o[0][1]), (2, o[1][0]), (3, 'tie'), (4, 'skip'), (4, 'undo'), (4, o[3][1]), (5, o[4][0]), (6, o[5][0]), (7, 'skip')]
    assert rows() == want
    js = store.judgements('ann')
    assert [j['comment'] for j in js] == ['', '', '', '1 u s', '', '', ''] and all(.25 < j['seconds'] < 120 for j in js)
    assert [j['shown'] for j in js] == o

def test_the_picture_in_the_book(browser, tmp_path):
    "One item of the world in JupyterLab; SLM_FORM_PICTURE=nbs/annotate_form.png renews the picture"
    from slm.data.world import World
    p = next(p for p in World().preferences(7, 400) if p.task.kind == 'who' and p.fault == 'chatty')
    store = PreferenceStore(tmp_path/'prefs.db')
    store.add_items([dict(prompt=f'warming up {i}', responses=['a', 'b']) for i in range(3)]+[
        dict(prompt=p.task.prompt, responses=[p.chosen, p.rejected])]+[dict(prompt=f'more {i}', responses=['a', 'b']) for i in range(4)])
    for it in store.items()[:3]: store.judge(it, 0, 'ann')
    notebook(tmp_path/'judge.ipynb', 'prefs.db'); picture = Path(os.environ.get('SLM_FORM_PICTURE') or tmp_path/'form.png')
    with server('lab', tmp_path) as url:
        page = browser.new_page(viewport=dict(width=1100, height=640)); page.goto(url, timeout=90_000)
        page.wait_for_selector('.jp-Notebook .jp-CodeCell', timeout=90_000); page.wait_for_timeout(2000)
        page.keyboard.press('Control+b'); page.click('.jp-Notebook .jp-CodeCell .cm-content'); page.keyboard.press('Shift+Enter')
        page.wait_for_selector('.slm-key-1', timeout=90_000); page.locator('.slm-text').first.click(); page.wait_for_timeout(500)
        assert page.evaluate("document.querySelector('.slm-form').contains(document.activeElement)")
        news = page.get_by_role('button', name='No', exact=True)
        if news.count(): news.first.click(); page.locator('.slm-text').first.click(); page.wait_for_timeout(800)
        box = page.locator('.jp-CodeCell').bounding_box()
        page.screenshot(path=picture, clip=dict(x=box['x'], y=box['y'], width=box['width'], height=box['height'])); page.close()
    assert picture.read_bytes()[:4] == b'\x89PNG' and 10_000 < picture.stat().st_size < 150_000
