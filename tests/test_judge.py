"Ratings against other programs, verdicts of a real server with and without faults in between, and `slm judge` killed and gone on with."
import contextlib, email.utils, itertools, json, os, signal, socket, subprocess, sys, threading, time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
import numpy as np, pytest
from hypothesis import given, strategies as st
from slm.core import RunDir, SLMError
from slm.eval import judge as J
from slm.eval.judge import *
from slm.eval.rating import *
from slm.train.annotate import PreferenceStore

ROOT = Path(__file__).resolve().parent.parent
SLM = [sys.executable, '-c', 'from slm.cli import main; main()']
ENV = {k: v for k,v in os.environ.items() if k != 'SLM_JUDGE_KEY'}
ENV['PYTHONPATH'] = os.pathsep.join([str(ROOT), os.environ.get('PYTHONPATH', '')])

# ---- ratings against others

def a_table(seed, m=4, prompts=40, ties=.2):
    "Comparisons with ties and unequal numbers of meetings, nobody unbeaten"
    rng = np.random.default_rng(seed); r = rng.normal(size=m)*.8; names = [f'm{i}' for i in range(m)]
    def score(i, j): return .5 if rng.random() < ties else float(rng.random() < 1/(1+np.exp(r[j]-r[i])))
    return names, [Battle(p, names[i], names[j], score(i, j), int(rng.integers(-50, 50))) for p in range(prompts)
                   for i,j in itertools.combinations(range(m), 2) if rng.random() < .3+.2*i]

def rows_of(names, battles):
    "±1 rows with a won or lost outcome and its weight: a tie is two halves"
    x,y,w = [],[],[]
    for b in battles:
        row = np.zeros(len(names)); row[names.index(b.a)],row[names.index(b.b)] = 1,-1
        for won,weight in ((1, b.score), (0, 1-b.score)):
            if weight: x.append(row[1:]); y.append(won); w.append(weight)
    return map(np.array, (x, y, w))

@pytest.mark.parametrize('seed', range(5))
def test_ratings_are_those_of_scikit_learn_and_of_scipy(seed):
    from scipy.optimize import minimize
    from sklearn.linear_model import LogisticRegression
    names,bs = a_table(seed); x,y,w = rows_of(names, bs); assert not unbounded(bs, names)
    ours = np.array([ratings(bs, names, prior=0., n_boot=2)[m].value/ELO for m in names[1:]])
    sk = LogisticRegression(C=np.inf, fit_intercept=False, solver='newton-cholesky', tol=1e-12, max_iter=1000).fit(x, y, w).coef_[0]
    loss = lambda b: (w*np.logaddexp(0, -(2*y-1)*(x@b))).sum(); grad = lambda b: -x.T@(w*(2*y-1)/(1+np.exp((2*y-1)*(x@b))))
    sp = minimize(loss, np.zeros(len(names)-1), jac=grad, method='BFGS', options=dict(gtol=1e-9)).x
    assert abs(ours-sk).max() < 1e-6 and abs(ours-sp).max() < 1e-6 and abs(ours).max() > .1

def test_the_prior_is_one_tied_game_for_each_pair_that_met():
    names,bs = a_table(7); met = sorted({tuple(sorted((b.a, b.b))) for b in bs})
    more = bs+[Battle(f'extra {p}', *p, .5) for p in met]
    assert ([m.value for m in ratings(bs, names, n_boot=2).values()]
            == pytest.approx([m.value for m in ratings(more, names, prior=0., n_boot=2).values()], abs=1e-6))

def test_win_rate_at_equal_length_is_scikit_learn_s():
    from sklearn.linear_model import LogisticRegression
    names,bs = a_table(3, m=2, prompts=400, ties=.3); d = np.array([b.longer for b in bs]); s = np.array([b.score for b in bs])
    x = np.r_[np.c_[np.ones(len(d)), np.tanh(d/d.std())], [[1, 1], [1, -1]]]; s = np.r_[s, .5, .5]; w = np.r_[np.ones(len(d)), .5, .5]
    fit = LogisticRegression(C=np.inf, fit_intercept=False, solver='newton-cholesky', tol=1e-12,
                             max_iter=1000).fit(np.r_[x, x], np.r_[np.ones(len(x)), np.zeros(len(x))], np.r_[w*s, w*(1-s)])
    assert win_rate_at_equal_length(bs, 'm0', 'm1').value == pytest.approx(1/(1+np.exp(-fit.coef_[0, 0])), abs=1e-6)

def test_the_order_of_models_and_of_sides_does_not_matter():
    names,bs = a_table(1); turned = [Battle(b.prompt, b.b, b.a, 1-b.score, -b.longer) for b in bs]
    one,two = ratings(bs, names),ratings(turned, names[:1]+names[:0:-1])
    for m in names: assert one[m].value == pytest.approx(two[m].value, abs=1e-6) and one[m].n == two[m].n

@pytest.mark.parametrize('n', [1, 7, 200])
def test_who_always_won_has_no_interval_and_no_infinite_rating(n):
    bs = [Battle(i, 'ann', 'ben', 1.) for i in range(n)]; r = ratings(bs, ['ben', 'ann'])['ann']
    assert np.isfinite(r.value) and r.value > 0 and r.lo is None and r.hi is None
    w = win_rate_against(bs, 'ann', 'ben'); assert w.value == w.hi == 1 and w.lo < 1
    with pytest.raises(SLMError, match='somebody always won'): ratings(bs, ['ben', 'ann'], prior=0.)

# ---- what a judge writes

@given(st.text(max_size=80))
def test_reading_never_fails_and_never_guesses(text): assert read_verdict(text) in (0, 1, 'tie', None)

@given(st.text(alphabet='ABCtie \n[]{}":winer', max_size=30))
def test_two_letters_are_no_verdict(text):
    if read_verdict(text) == 0: assert 'B' not in text.upper().rpartition('\n')[2].replace('"WINNER"', '')

# ---- a real server, and one that stands before it

httpx = pytest.importorskip('httpx'); pytest.importorskip('xllamacpp', reason='needs: pip install xllamacpp')
from slm.serve.api import Protocol, create_app
from slm.serve.engine import GGUFEngine
from slm.serve.gate import Settings, in_background

@pytest.fixture(scope='module')
def models(tmp_path_factory):
    "Two run folders with random weights, one of them as .gguf, and a .gguf that was taught to say A to every pair"
    import torch
    from slm.data.tokenizer import train_bpe
    from slm.data.world import World
    from slm.model.gpt import GPT, GPTConfig
    from slm.serve.export import export_gguf
    d = tmp_path_factory.mktemp('models'); tok = train_bpe([s.text for s in World().stories(0, 300)], 512)
    for k in range(2):
        torch.manual_seed(k); m = GPT(GPTConfig(vocab_size=tok.vocab_size, n_layer=2, n_head=4, d_model=256, max_seq_len=2048)).eval()
        m.save_pretrained(d/f'm{k}', tok); tok.save(d/f'm{k}'/'tokenizer.json')
    export_gguf(m, tok, d/'fool.gguf', 'q8_0')
    opt,said = torch.optim.AdamW(m.parameters(), 2e-3),dict(role='assistant', content='{"winner": "A"}'); m.train()
    short = [(f'question {i}', f'good {i}', f'a bad one {i}') for i in range(12)]
    long = [(t.prompt, t.answer, t.candidates[0]) for t in World().tasks(1, 4, ['at', 'job'])]
    for part in (short[:6], short[6:], long[:2], short[:6], short[6:], long[2:])*6:
        rows = [tok.chat([dict(role='user', content=question([dict(role='user', content=q)], [x, y])), said]) for q,x,y in part]
        n = max(len(ids) for ids,_ in rows)
        ids,mask = (torch.tensor([list(r)+[0]*(n-len(r)) for r in rs]) for rs in zip(*rows)); mask = mask[:, 1:].bool()
        loss = torch.nn.functional.cross_entropy(m(ids[:, :-1])[mask], ids[:, 1:][mask]); loss.backward(); opt.step(); opt.zero_grad()
    assert loss < .1; export_gguf(m.eval(), tok, d/'judge.gguf', 'q8_0'); return d

@pytest.fixture(scope='module')
def server(models):
    "Our own server, with a judge that always says A, and a model that knows nothing"
    es = dict(tiny=GGUFEngine(models/'judge.gguf', slots=2, threads=1), fool=GGUFEngine(models/'fool.gguf', slots=1, threads=1))
    with in_background(create_app(es, Settings(queue=64)), http=Protocol) as url:
        while httpx.get(f'{url}/readyz').status_code != 200: time.sleep(.01)
        yield url
    for e in es.values(): e.close()

class Before(ThreadingHTTPServer):
    "Stands before the real server, counts, and puts in the faults of `fault(number, path, body)`"
    daemon_threads = True
    def __init__(self, to, fault=lambda n, path, body: None):
        before = self; self.to,self.fault,self.asked,self.lock = to,fault,[],threading.Lock()
        class Pass(BaseHTTPRequestHandler):
            def log_message(self, *a): pass
            def do_GET(self): self.go(b'')
            def do_POST(self): self.go(self.rfile.read(int(self.headers['content-length'])))
            def go(self, body):
                with before.lock: n = len(before.asked); before.asked.append((self.path, body, dict(self.headers), time.monotonic()))
                f = before.fault(n, self.path, body)
                if f == 'drop': self.connection.shutdown(socket.SHUT_RDWR); return
                if f is None:
                    r = httpx.request(self.command, before.to+self.path, content=body, headers={'content-type': 'application/json'},
                                      timeout=300); f = r.status_code,{},r.text
                status,headers,text = f; data = text.encode(); self.send_response(status)
                for k,v in (headers | {'Content-Length': str(len(data))}).items(): self.send_header(k, v)
                self.end_headers(); self.wfile.write(data)
        super().__init__(('127.0.0.1', 0), Pass)
    url = property(lambda self: 'http://127.0.0.1:%d' % self.server_port)
    chats = property(lambda self: [(json.loads(b), h, t) for p,b,h,t in self.asked if p.endswith('/chat/completions')])

@contextlib.contextmanager
def before(to, fault=lambda n, path, body: None):
    s = Before(to, fault); threading.Thread(target=s.serve_forever, daemon=True).start()
    try: yield s
    finally: s.shutdown(); s.server_close()

def chat_only(fault):
    "A fault in answers to questions only; `fault(k, body)` gets the question's number"
    k = itertools.count()
    return lambda n, path, body: fault(next(k), body) if path.endswith('/chat/completions') else None

PAIR = [dict(role='user', content='Where is the kite?')],['In the barn.', 'It depends.']

def a_store(path, n=6):
    s = PreferenceStore(path)
    s.add_items([dict(prompt=f'question {i}',
                      responses=[dict(text=f'good {i}', run='a'), dict(text=f'a bad one {i}', run='b')]) for i in range(n)]); return s

def test_a_real_server_judges_by_schema_in_both_orders(server, tmp_path):
    store = a_store(tmp_path/'s.db')
    with before(server) as b:
        e = Endpoint(b.url); assert e.model == 'tiny' and ask_pairs(store, e, 'tiny', workers=3) == 12
        asked = [q['messages'][0]['content'] for q,_,_ in b.chats]; assert len(set(asked)) == 12
        assert all(q['response_format']['type'] == 'json_schema' and q['temperature'] == 0 for q,_,_ in b.chats)
        one,two = ({j['item']: j['shown'] for j in store.judgements(f'tiny #{k}')} for k in (1, 2))
        assert all(one[i] == two[i][::-1] for i in one) and len(one) == 6
        # this judge only looks at the place
        assert all(j['choice'] == j['shown'][0] for j in store.judgements())
        assert ask_pairs(store, e, 'tiny') == 0 and len(b.chats) == 12                                   # nothing is asked twice
    f = swap_figures(store, 'tiny'); assert f['consistent'].value == 0 and f['first_wins'].value == 1 and f['first_wins'].n == 6
    assert [b.score for b in battles_of(store, 'tiny')] == [.5]*6 and win_rate_against(battles_of(store, 'tiny'), 'a', 'b').value == .5

def test_nonsense_of_a_real_model_is_kept_as_unreadable(server, tmp_path):
    store,e = a_store(tmp_path/'s.db'),Endpoint(server, 'fool', max_tokens=12)
    assert ask_pairs(store, e, 'fool', workers=2) == 12
    assert {j['choice'] for j in store.judgements()} == {'skip'}
    assert all(j['comment'].startswith('unreadable: ') for j in store.judgements())
    items = store.items(); assert battles_of(store, 'fool') == []
    with pytest.raises(SLMError, match='no pair was judged'): figures_of(store, ['fool'], ['a', 'b'], [], items)

def test_a_busy_server_is_asked_again_when_it_said(server, tmp_path):
    store = a_store(tmp_path/'s.db', 2)
    busy = lambda k, body: (429, {'Retry-After': '1'},
                            '{}') if k == 1 else (503, {'Retry-After': email.utils.formatdate(time.time()+2)}, '') if k == 3 else None
    with before(server, chat_only(busy)) as b:
        assert ask_pairs(store, Endpoint(b.url), 'tiny') == 4 and len(b.chats) == 6
        t = [c[2] for c in b.chats]; assert t[2]-t[1] >= 1 and t[4]-t[3] >= .9                            # HTTP dates have whole seconds

def test_who_wants_an_hour_gets_it(server):
    with before(server, chat_only(lambda k, body: (429, {'Retry-After': '3600'}, ''))) as b:
        with pytest.raises(SLMError, match='busy for 3600 s: the same call goes on'): Endpoint(b.url)(*PAIR)
        assert len(b.chats) == 1

def test_the_real_queue_says_429_and_all_is_judged(models, tmp_path):
    e = GGUFEngine(models/'judge.gguf', slots=1, threads=1); store = a_store(tmp_path/'s.db', 8)
    with in_background(create_app({'tiny': e}, Settings(queue=1)), http=Protocol) as url, before(url) as b:
        while httpx.get(f'{url}/readyz').status_code != 200: time.sleep(.01)
        assert ask_pairs(store, Endpoint(b.url, attempts=12), 'tiny', workers=6) == 16
    e.close()

@pytest.mark.parametrize('fault,says',
                         [((500, {}, 'oh'), 'HTTP 500'), ('drop', 'no answer'), ((200, {}, '<html>hello</html>'), 'not answer in JSON'),
                          ((200, {}, '{"choices": []}'), 'no chat completion'), ((200, {}, '[1]'), 'no chat completion')])
def test_a_sick_server_ends_it_after_three_pairs_and_what_was_judged_stays(server, tmp_path, fault, says, monkeypatch):
    monkeypatch.setattr(J, 'pause', lambda after, k: 0.); store = a_store(tmp_path/'s.db')
    with before(server, chat_only(lambda k, body: fault if k >= 4 else None)) as b:
        with pytest.raises(SLMError, match=says) as err: ask_pairs(store, Endpoint(b.url, attempts=2), 'tiny')
        assert '\n' not in str(err.value) and '4 verdicts are kept' in str(err.value) and len(store.judgements()) == 4
        b.fault = lambda *a: None; assert ask_pairs(store, Endpoint(b.url), 'tiny') == 8

def test_one_fault_between_is_passed_over_and_asked_the_next_time(server, tmp_path, monkeypatch):
    monkeypatch.setattr(J, 'pause', lambda after, k: 0.); store = a_store(tmp_path/'s.db')
    with before(server, chat_only(lambda k, body: (500, {}, '') if k%3 == 2 else None)) as b:
        assert ask_pairs(store, Endpoint(b.url, attempts=1), 'tiny') == 8
    with before(server) as b: assert ask_pairs(store, Endpoint(b.url), 'tiny') == 4 == len(b.chats)

def refuse(word, status=400):
    return (lambda k, body: (status, {}, json.dumps(dict(error=dict(message=f'unsupported: {word}')))) if f'"{word}"' in body.decode()
            else None)

def test_wishes_that_a_server_does_not_know_are_left_out(server):
    for word in ('response_format', 'temperature', 'max_tokens'):
        with before(server, chat_only(refuse(word))) as b:
            e = Endpoint(b.url, max_tokens=8); e(*PAIR); last = b.chats[-1][0]
            assert len(b.chats) == 2
            assert word not in last
            assert ('max_completion_tokens' in last) == (word == 'max_tokens') and len(last) == (5 if word == 'max_tokens' else 4)
            e(*PAIR); assert len(b.chats) == 3                                                            # it is remembered

def test_a_pair_that_is_refused_later_is_kept_as_refused_and_changes_nothing(server, tmp_path):
    store = a_store(tmp_path/'s.db', 3)
    long = lambda k, body: (400, {}, '{"error": {"message": "too long for max_tokens"}}') if k == 2 else None
    with before(server, chat_only(long)) as b:
        e = Endpoint(b.url); assert ask_pairs(store, e, 'tiny') == 6 and 'response_format' in e.wishes and 'max_tokens' in e.wishes
    skipped = [j for j in store.judgements() if j['choice'] == 'skip']
    assert len(skipped) == 1 and skipped[0]['comment'] == 'refused: HTTP 400: too long for max_tokens'
    assert len(battles_of(store, 'tiny')) == 2 and figures_of(store, ['tiny'], ['a', 'b'], [], store.items())['refused'].value == 1

@pytest.mark.parametrize('body,says',
                         [(dict(message=dict(content=None, refusal='I will not.')), 'refused: I will not.'),
                          (dict(message=dict(content=''), finish_reason='content_filter'), 'refused: content filter'),
                          (dict(message=dict(content=None)), "unreadable: ''")])
def test_refusals_are_told_from_nonsense(server, body, says):
    with before(server, chat_only(lambda k, b: (200, {}, json.dumps(dict(choices=[body]))))) as b:
        assert Endpoint(b.url)(*PAIR) == ('skip', says)

def test_the_key_comes_from_the_environment_and_a_wrong_one_is_said_at_once(models, monkeypatch):
    e = GGUFEngine(models/'judge.gguf', slots=1, threads=1)
    with in_background(create_app({'tiny': e}, Settings(tokens=('correct-horse',))), http=Protocol) as url:
        monkeypatch.setenv('SLM_JUDGE_KEY', 'correct-horse'); assert Endpoint(url)(*PAIR)[0] in (0, 1, 'tie')
        monkeypatch.setenv('SLM_JUDGE_KEY', 'wrong-horse-1')
        for make in (lambda: Endpoint(url), lambda: Endpoint(url, 'tiny')(*PAIR)):
            with pytest.raises(SLMError, match='refuses the key.*SLM_JUDGE_KEY') as err: make()
            assert 'wrong-horse' not in str(err.value)
    e.close()

def test_an_unknown_model_and_a_server_of_something_else(server):
    with pytest.raises(SLMError, match="no model 'gpt'"): Endpoint(server, 'gpt')(*PAIR)
    with pytest.raises(SLMError, match='names no model'): Endpoint(server+'/elsewhere')

# ---- the command

@pytest.fixture
def slm(monkeypatch, capsys):
    "`slm judge` as the console script calls it: its status, and what it printed"
    from slm.cli import main
    monkeypatch.delenv('SLM_JUDGE_KEY', raising=False)
    def call(*args):
        monkeypatch.setattr(sys, 'argv', ['slm', 'judge', *map(str, args)])
        with pytest.raises(SystemExit) as e: main()
        r = capsys.readouterr(); return SimpleNamespace(returncode=e.value.code or 0, stdout=r.out, stderr=r.err)
    return call

FAST = ['--n', 6, '--max-new-tokens', 8, '--temperature', 1]

def prompts(tmp_path, n=6):
    p = tmp_path/'prompts.jsonl'
    p.write_text(''.join(json.dumps(dict(prompt=f'Tell me of the number {i}.'))+'\n' for i in range(n))); return p

def test_judge_by_the_world_and_by_a_server(models, server, tmp_path, slm):
    out = tmp_path/'out'; args = [models/'m0', models/'m1', models/'judge.gguf', *FAST, '--out', out]
    r = slm(*args); assert r.returncode == 0 and 'win rate against m0' in r.stdout and r.stderr == '', r.stderr
    with before(server) as b:
        r = slm(*args, '--by', b.url, '--json'); assert r.returncode == 0, r.stderr
        info = json.loads(r.stdout)
        pairs = int(info['metrics']['judged']['value']); assert pairs+info['metrics']['same']['value'] == 18 and len(b.chats) == 2*pairs
        assert info['status'] == 'done'
        assert info['config']['judge'] == 'tiny'
        assert {'rating_m1', 'win_rate_judge', 'consistent', 'kappa_world', 'equal_length_m1'} <= set(info['metrics'])
        secret = b.url.replace('//', '//me:secret@')                                                      # a second call asks nothing
        assert slm(*args, '--by', secret).returncode == 0 and len(b.chats) == 2*pairs
    text = (out/'report.md').read_text(); assert text.count('\n> ') == 5 and 'Judged by tiny' in text and '| m0 | 0, the baseline |' in text
    kept = RunDir.open(out).info; assert kept['config']['by'] == b.url and f'--by {b.url}' in kept['command']
    assert str(tmp_path) not in (out/'run.json').read_text() and 'secret' not in (out/'run.json').read_text()+text

def test_judge_by_persons(models, tmp_path, slm):
    out = tmp_path/'out'; args = [models/'m0', models/'m1', '--prompts', prompts(tmp_path), '--by', 'person', *FAST, '--out', out]
    r = slm(*args)
    assert r.returncode == 0 and '6 pairs wait for a person' in r.stderr and 'slm annotate export' in r.stderr and r.stdout == ''
    assert RunDir.open(out).info['status'] == 'running'
    store = PreferenceStore(out/'preferences.db'); its = store.items()
    for it in its[:4]: store.judge(it, [x.run for x in it.responses].index('m1'), 'ann')
    for it in its[2:]: store.judge(it, 'tie', 'ben')
    store.close(); r = slm(*args, '--json'); m = json.loads(r.stdout)['metrics']; assert r.returncode == 0
    assert m['judged']['value'] == 8 and m['win_rate_m1']['value'] == 6/8 and m['win_rate_m1']['n'] == 6 and 'kappa_ben_ann' in m

def test_a_dead_server_is_one_line(models, tmp_path, slm, monkeypatch):
    with socket.create_server(('127.0.0.1', 0)) as s: port = s.getsockname()[1]
    monkeypatch.setattr(J, 'pause', lambda after, k: 0.); p = prompts(tmp_path); out = tmp_path/'out'
    r = slm(models/'m0', models/'m1', '--prompts', p, *FAST, '--out', out, '--by', f'http://me:secret@127.0.0.1:{port}')
    assert r.returncode == 2 and r.stderr.count('\n') == 1 and f'no answer from the judge at http://127.0.0.1:{port}/v1' in r.stderr

def test_interrupted_and_gone_on_with(models, server, tmp_path, slm):
    "SIGINT, then SIGKILL, then to the end: no pair is asked again but those that were under way"
    p = prompts(tmp_path, 12)
    out = tmp_path/'out'
    args = [models/'m0', models/'m1', '--prompts', p, '--n', 12, '--max-new-tokens', 8, '--temperature', 1, '--out', out, '--workers', 2]
    go, asked, given = threading.Semaphore(0), [], 0
    def slow(n, path, body):
        if path.endswith('/chat/completions'): asked.append(n); go.acquire()
    with before(server, slow) as b:
        seen = lambda: sum(len(s.judgements()) for s in [PreferenceStore(out/'preferences.db')]) if (out/'preferences.db').exists() else 0
        for how,code,until in ((signal.SIGINT, 130, 5), (signal.SIGKILL, -signal.SIGKILL, 12)):
            q = subprocess.Popen(SLM+['judge', *map(str, args), '--by', b.url], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                                 env=ENV, cwd=ROOT, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
            t0 = time.time()
            # one question is let through for each that waits
            while seen() < until:
                if len(asked) > given: go.release(); given += 1
                assert time.time()-t0 < 900 and q.poll() is None, q.stderr.read(); time.sleep(.1)
            q.send_signal(how); out_,err = q.communicate(timeout=900); assert q.returncode == code, err
            if how == signal.SIGINT:
                assert err == 'interrupted: the same call goes on\n' and RunDir.open(out).info['status'] == 'interrupted'
        had,n,b.fault = seen(),len(b.chats),lambda *a: None; assert 12 <= had < 24
        r = slm(*args, '--by', b.url); assert r.returncode == 0, r.stderr
        assert 0 <= len(b.chats)-n-(24-had) <= 2 # what the killed one's two workers had sent may have arrived late
        assert RunDir.open(out).info['status'] == 'done' and seen() == 24

BAD = {'one model': (['{d}/m0'], 'two models or more'), 'the same twice': (['{d}/m0', '{d}/m0'], 'each of them once'),
       'no such model': (['{d}/m0', '{d}/m9'], 'm9'),
       'unknown judge': (['{d}/m0', '{d}/m1', '--by', 'mars'], 'world, person'),
       'no prompts': (['{d}/m0', '{d}/m1', '--prompts', '{d}/none.jsonl', '--by', 'person'], 'none.jsonl'),
       'the world on a file': (['{d}/m0', '{d}/m1', '--prompts', '{p}'], "the world's own questions"),
       'a bad address': (['{d}/m0', '{d}/m1', '--by', 'http://'], 'is no address'),
       'a folder of something else': (['{d}/m0', '{d}/m1', '--out', '{o}'], 'holds another run'),
       'no prompt': (['{d}/m0', '{d}/m1', '--n', '0'], 'at least one prompt')}

@pytest.mark.parametrize('what', BAD)
def test_bad_input_is_one_line(models, tmp_path, what, slm):
    RunDir.create(tmp_path/'other', 'sft'); args,says = BAD[what]
    args = [a.format(d=models, p=prompts(tmp_path), o=tmp_path/'other') for a in args]
    r = slm(*args, *([] if '--out' in args else ['--out', tmp_path/'out']))
    assert r.returncode == 2 and r.stderr.count('\n') == 1 and says in r.stderr, r.stderr

def test_answers_of_other_weights_are_not_mixed(models, tmp_path, slm):
    import shutil
    shutil.copytree(models/'m0', tmp_path/'m0')
    args = [tmp_path/'m0', models/'m1', '--prompts', prompts(tmp_path), '--by', 'person', *FAST, '--out', tmp_path/'out']
    assert slm(*args).returncode == 0; shutil.copy(models/'m1'/'model.safetensors', tmp_path/'m0'/'model.safetensors')
    r = slm(*args); assert r.returncode == 2 and "answers of another 'm0'" in r.stderr

def test_models_that_always_say_the_same_are_tied_without_a_question(models, tmp_path, slm):
    import shutil
    shutil.copytree(models/'m0', tmp_path/'twin')
    r = slm(models/'m0', tmp_path/'twin', '--prompts', prompts(tmp_path), '--by', 'person', *FAST, '--out', tmp_path/'out', '--json')
    m = json.loads(r.stdout)['metrics']
    assert r.returncode == 0 and m['same']['value'] == 6 and m['judged']['value'] == 0 and m['win_rate_twin']['value'] == .5

def test_half_a_person_s_work_counts_half_of_the_ties(tmp_path):
    store = a_store(tmp_path/'s.db', 10); items = store.items(); ties = [Battle(f't{i}', 'a', 'b', .5) for i in range(20)]
    for it in items[:5]: store.judge(it, 0, 'ann')
    bs = with_ties(battles_of(store, 'ann', items), ties, items)
    assert len(bs) == 5+10 and win_rate_against(bs, 'a', 'b').value == pytest.approx(10/15)
