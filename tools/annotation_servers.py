"""Label Studio and doccano on this machine, each in a virtual environment of its own: annotation_servers.py label-studio|doccano

The environments are made on first use in $SLM_HOME/tools (about 1 GB together). The server listens on 127.0.0.1 only, keeps its data in a
folder that is thrown away, and runs until Ctrl-C.
"""
import contextlib, os, socket, subprocess, sys, tempfile, time, urllib.request, venv
from pathlib import Path
from slm.core import SLMError, slm_home

PACKAGES = {'label-studio': ['label-studio==1.23.2', 'fastcore<2'],   # fastcore: so that its Python can import slm, and its SDK beside it
            'doccano': ['doccano==1.8.4', 'marshmallow<4', 'numpy<2']}
USER, PASSWORD, TOKEN = 'ann@example.org', 'only-on-this-machine', 'a11ce'*8

def python(name, home=None):
    "The Python of a tool's environment, which is made when it is missing"
    env = Path(home or slm_home()/'tools')/name; exe, done = env/'bin'/'python', env/'installed.txt'
    want = '\n'.join(PACKAGES[name])
    if not done.exists() or done.read_text() != want:
        print(f'installing {name} (minutes)', file=sys.stderr)
        venv.create(env, with_pip=True, symlinks=True)
        r = subprocess.run([exe, '-m', 'pip', 'install', '--quiet', '--disable-pip-version-check', *PACKAGES[name]],
                           stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if r.returncode: raise SLMError(f'{name} cannot be installed here: {(r.stdout.strip().splitlines() or ["pip said nothing"])[-1]}')
        done.write_text(want)
    return exe

def free_port():
    with socket.socket() as s: s.bind(('127.0.0.1', 0)); return s.getsockname()[1]

@contextlib.contextmanager
def _processes(cmds, env, folder, url, seconds):
    "Run commands side by side until the block ends; wait till `url` answers"
    ps = []
    with open(folder/'log.txt', 'w') as log:
        try:
            for cwd,cmd in cmds:
                ps.append(subprocess.Popen(list(map(str, cmd)), cwd=cwd, env=os.environ | env, stdin=subprocess.DEVNULL, stdout=log,
                                           stderr=subprocess.STDOUT))
            t0 = time.time()
            while True:
                with contextlib.suppress(OSError):
                    if urllib.request.urlopen(url, timeout=30).status == 200: break
                if time.time()-t0 > seconds or any(p.poll() is not None for p in ps):
                    raise SLMError(f'{cmds[0][1][0]} did not start: {(folder/"log.txt").read_text()[-2000:]}')
                time.sleep(.5)
            yield
        finally:
            for p in ps: p.terminate()
            for p in ps:
                try: p.wait(20)
                except subprocess.TimeoutExpired: p.kill(); p.wait()

@contextlib.contextmanager
def label_studio(home=None):
    "A running Label Studio; yields its address"
    exe, port = python('label-studio', home), free_port()
    with tempfile.TemporaryDirectory(prefix='slm-label-studio-', ignore_cleanup_errors=True) as d:
        cmd = [exe.with_name('label-studio'), 'start', '-b', '-p', port, '--internal-host', '127.0.0.1', '--data-dir', d, '--username',
               USER, '--password', PASSWORD,
               '--user-token', TOKEN, '--enable-legacy-api-token']
        env = dict(COLLECT_ANALYTICS='false', LATEST_VERSION_CHECK='false', SENTRY_DSN='', FRONTEND_SENTRY_DSN='',
                   LABEL_STUDIO_DISABLE_SIGNUP_WITHOUT_LINK='false')
        with _processes([(d, cmd)], env, Path(d), f'http://127.0.0.1:{port}/health', 300): yield f'http://127.0.0.1:{port}'

@contextlib.contextmanager
def doccano(home=None):
    "A running doccano with its task queue; yields its address"
    exe, port = python('doccano', home), free_port()
    backend = next((exe.parent.parent/'lib').glob('python*/site-packages/backend'))
    with tempfile.TemporaryDirectory(prefix='slm-doccano-', ignore_cleanup_errors=True) as d:
        env = dict(DOCCANO_HOME=d, STANDALONE='True', DJANGO_SETTINGS_MODULE='config.settings.production',
                   DATABASE_URL=f'sqlite:///{d}/db.sqlite3', MEDIA_ROOT=f'{d}/media',
                   SECRET_KEY=TOKEN, DEBUG='False')
        for args in (['init'], ['createuser', '--username', 'ann', '--password', PASSWORD],
                     ['createuser', '--username', 'ben', '--password', PASSWORD]):
            r = subprocess.run([exe.with_name('doccano'), *args], env=os.environ | env, cwd=d, capture_output=True, text=True)
            if r.returncode: raise SLMError(f'doccano {args[0]}: {r.stderr[-2000:]}')
        # its own webserver listens on all addresses
        web = [exe, '-m', 'gunicorn', '--bind', f'127.0.0.1:{port}', '--workers', 2, 'config.wsgi']
        queue = [exe, '-m', 'celery', '--app=config', 'worker', '--loglevel=info', '--concurrency=1', '--pool=solo']
        with _processes([(backend, web), (backend, queue)], env, Path(d), f'http://127.0.0.1:{port}/v1/health/?format=json', 120):
            yield f'http://127.0.0.1:{port}'

if __name__ == '__main__':
    if sys.argv[1:] not in (['label-studio'], ['doccano']): sys.exit(__doc__.strip())
    with (label_studio if sys.argv[1] == 'label-studio' else doccano)() as url:
        print(f'{sys.argv[1]} at {url}; ' + (f'{USER} / {PASSWORD}, token {TOKEN}' if sys.argv[1] == 'label-studio'
                                             else f'ann or ben / {PASSWORD}')+'; Ctrl-C ends it')
        with contextlib.suppress(KeyboardInterrupt): time.sleep(10**6)
