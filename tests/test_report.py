"The ledger and its page: from the command line, with faults, interrupted, and in a browser."
import json, os, re, shutil, signal, subprocess, sys, time
from pathlib import Path
import numpy as np, pytest
from slm.cli import main
from slm.core import Metric, RunDir, SLMError
from slm.data.tokenizer import train_bpe
from slm.data.world import World
from slm.eval.ledger import Question, keep_ledger, ones, open_stages, world_questions
from slm.eval.life import life_table
from slm.eval.pairs import metrics_table
from slm.eval.stats import holm, paired_bootstrap
from slm.model.gpt import GPT, GPTConfig
from slm.report import render, report

def stage(path, tok, parent=None, name='pretrain', data='world:0.5', status='done', n_layer=1):
    "A run with random weights, as a training would leave it"
    r = RunDir.create(path, name, dict(corpus=data), seed=1, data=dict(name=data, license='Apache-2.0', fingerprint='ab12'), parent=parent)
    GPT(GPTConfig(vocab_size=tok.vocab_size, n_layer=n_layer, d_model=32, n_head=2, n_kv_head=1,
                  max_seq_len=512)).save_pretrained(r.path, tok)
    (r/'log.csv').write_text('step,loss,valid_loss\n1,5.0,\n2,4.5,4.6\n3,4.2,\n')
    r.add_metrics(seconds=90., tokens=1e5); r.finish(status); return r.path

@pytest.fixture(scope='module')
def life(tmp_path_factory):
    root, tok = tmp_path_factory.mktemp('life'), train_bpe((s.text for s in World().stories(1, 300)), 700)
    stage(root/'pretrain', tok)
    stage(root/'sft', tok, 'pretrain', 'sft', n_layer=2)
    stage(root/'half', tok, status='interrupted'); RunDir.create(root/'empty', 'demo').finish()
    ev = RunDir.create(root/'pretrain'/'bias_crows', 'bias', {}, parent='pretrain')
    ev.info['chance'] = dict(all=.5); ev.add_metrics(all=Metric(.61, .5, .7, 100, 'of pairs')); ev.finish(); return root

def slm(monkeypatch, *args):
    monkeypatch.setattr(sys, 'argv', ['slm', *map(str, args)])
    try: main()
    except SystemExit as e: return e.code or 0
    return 0

def test_a_life_on_a_page(life, tmp_path, monkeypatch, capsys):
    out = tmp_path/'page'
    assert slm(monkeypatch, 'report', life/'sft', life/'pretrain', '--n', 6, '--prompt', 'Who has <b>it</b>?', '--watts', 100, '--out',
               out) == 0
    said = capsys.readouterr().out; assert 'pretrain/excess' in said and 'sft/bias' in said and 'report.html' in said
    run, page, text = RunDir.open(out), (out/'report.html').read_text(), (out/'report.md').read_text()
    assert list(run.info['stages']) == ['pretrain', 'sft']
    assert run.info['stages']['sft']['cost']['wh']['value'] == pytest.approx(2.5) and len(run.info['changes']) == 4
    for t in (page, text):
        assert all(s in t for s in ('excess over the true entropy', 'ab12', 'Apache-2.0', '2.50 Wh', '100 W, as given', '0.61 [0.5, 0.7]',
                                    'layers 2'))
    assert '<b>' not in page
    assert '<b>' not in text.split('### To repeat it')[0]
    assert page.count('<svg') == 2+4 and not re.search(r'(?:src|href)="(?!data:|#)|<script', page)
    assert slm(monkeypatch, 'report', life/'sft', life/'pretrain', '--n', 6, '--out', tmp_path/'again', '--json') == 0
    again = json.loads(capsys.readouterr().out)
    assert {k: m for k,m in again['metrics'].items()} == run.info['metrics']
    assert str(life) not in json.dumps(again) and str(life) not in page

def test_tables_of_a_page_are_narrow_and_have_units(life, tmp_path):
    text = (report([life/'pretrain', life/'sft'], tmp_path/'page', n=4)/'report.md').read_text()
    rows = [l for l in text.splitlines() if l.startswith('|')]
    assert max(map(len, rows)) <= 100, max(rows, key=len)
    for says,unit in (('excess over the true entropy', 'bits/byte ↓'), ('acceptance rate (judge)', 'of answers ↑'),
                      ('state probes: right answers', 'of questions ↑')):
        assert [l.split(' | ')[3] for l in rows if l.startswith(f'| {says} | pretrain |')] == [unit]
    assert any(re.fullmatch(r'\| excess over the true entropy \| sft \| [+-]\S+ \[.*\] bits/byte \| .*', l) for l in rows)

def test_table_of_a_life(tmp_path):
    "In words of the field, with units, and no wider than a terminal"
    run = RunDir.create(tmp_path/'demo', 'demo')
    for k in ('pretrain', 'sft', 'dpo'):
        run.add_metrics(**{f'{k}_seconds': Metric(1234., unit='s'), f'{k}_accepted': Metric(.363, .325, .403, 600, 'of tasks'),
                           f'{k}_gain': Metric(-.136, -.15, .12, 600, 'of tasks'),
                           f'{k}_excess': Metric(.1234, .1201, .1267, 200, 'bits/byte')})
    rows = life_table(run).splitlines()
    assert rows[0] == '| stage | time | acceptance rate (judge) | gain (paired) | excess over true entropy (bits/byte) |'
    assert rows[-1] == '| aligned | 1,234 s | 36.3 % [32.5, 40.3] | -13.6 % [-15.0, +12.0] | 0.123 [0.120, 0.127] |'
    assert max(map(len, rows)) <= 100

def test_lines_of_a_measurement(tmp_path):
    "The longest names and units that the benchmarks have; what is known of chance stands beside"
    run = RunDir.create(tmp_path/'ev', 'bias'); run.info['chance'] = dict(Physical_appearance_disambig_accuracy=1/3)
    run.add_metrics(Physical_appearance_disambig_accuracy=Metric(.5384, .4414, .6328, 12_345, 'of questions'),
                    **{'sent-weat8_hidden_effect': Metric(-.5384, -.4414, -.6328, 12_345, 'standard deviations')})
    a,b = metrics_table(run).splitlines()
    assert a == 'Physical_appearance_disambig_accuracy 0.5384 [0.4414, 0.6328] of questions, n=12,345, chance 0.333'
    assert b.endswith('standard deviations, n=12,345') and len(a) <= 100 and len(b) <= 100

def test_the_page_outlives_the_weights(life, tmp_path):
    lives = shutil.copytree(life, tmp_path/'life')
    r = report([lives/'pretrain', lives/'sft'], tmp_path/'page', n=4); was = (r/'report.html').read_text()
    shutil.rmtree(lives); (r/'report.html').unlink(); report([tmp_path/'page']); assert (r/'report.html').read_text() == was

def test_a_model_from_elsewhere_is_a_stage(life, tmp_path):
    from slm.model.pretrained import load_model_and_tokenizer
    from slm.serve.export import export_gguf
    export_gguf(*load_model_and_tokenizer(life/'sft'), tmp_path/'served.gguf', 'f32')
    r = report([life/'sft', life/'pretrain', tmp_path/'served.gguf'], tmp_path/'page', n=5)
    m = r.info['metrics']; assert list(r.info['stages']) == ['pretrain', 'sft', 'served']
    # the same weights
    for k in ('excess', 'bias'): assert m[f'served/{k}']['value'] == pytest.approx(m[f'sft/{k}']['value'], abs=1e-4)
    assert [c['p_holm'] for c in r.info['changes'] if c['after'] == 'served' and c['question'] == 'states'] == [1.]
    assert 'a model without a record' in (r/'report.html').read_text()

def test_real_text_and_pairs(life, tmp_path, monkeypatch, capsys):
    (tmp_path/'p.jsonl').write_text('\n'.join(json.dumps(dict(sentence_good=f'It was {i}.',
                                                              sentence_bad=f'was {i} It.')) for i in range(5)))
    (tmp_path/'crows.csv').write_text('id,sent_more,sent_less,stereo_antistereo,bias_type\n'
                                      +''.join(f'{i},He is {i}.,She is {i}.,stereo,gender\n' for i in range(4)))
    (tmp_path/'text.txt').write_text('\n\n'.join(f'The old house number {i} stood in the street, and nobody knew who had built it.'
                                                 for i in range(400)))
    r = report([life/'sft'], tmp_path/'page', 5, corpus=f"files:{tmp_path/'text.txt'}", pairs=[tmp_path/'p.jsonl'],
               bias=dict(crows=str(tmp_path/'crows.csv')))
    n = {k.split('/')[1]: m['n'] for k,m in r.info['metrics'].items()}
    assert 0 < n.pop('bpb') <= 5 and n == dict(p=5, crows=4) and r.info['changes'] == []
    with pytest.raises(SLMError, match='is not what .* was trained on'):
        report([life/'pretrain'], tmp_path/'other', 5, corpus=f"files:{tmp_path/'text.txt'}")
    assert slm(monkeypatch, 'report', life/'sft', '--crows', tmp_path/'none.csv', '--out', tmp_path/'x') == 2
    assert 'holds no' in capsys.readouterr().err

@pytest.mark.parametrize('args,says',
                         [(['nowhere'], 'nowhere'), (['half'], 'slm resume'), (['sft', 'sft'], 'two stages are called sft'),
                          (['empty'], 'holds no stage with weights'), (['pretrain', '--toxicity', 'sft'], 'no text classifier'),
                          (['pretrain', '--device', 'tpu'], 'tpu')])
def test_bad_input(life, tmp_path, monkeypatch, capsys, args, says):
    paths = [life/a if a in ('nowhere', 'half', 'empty', 'sft', 'pretrain') else a for a in args]
    assert slm(monkeypatch, 'report', *paths, '--n', 2, '--out', tmp_path/'x') == 2; err = capsys.readouterr().err
    # transformers may say more before it
    last = err.splitlines()[-1]; assert last.startswith('slm: error: ') and says in last and 'Traceback' not in err

def test_what_was_measured_before_an_interruption_is_kept(life, tmp_path):
    def ctrl_c(model, tok): raise KeyboardInterrupt
    qs = dict(a=Question('quality', 'a', '', 'higher', lambda m, t: ones([1, 0, 1])),
              b=Question('bias', 'b', '', '', lambda m, t: ones([1, 1]) if m.cfg.n_layer == 1 else ctrl_c(m, t)))
    with pytest.raises(KeyboardInterrupt): keep_ledger(open_stages([life/'pretrain', life/'sft']), qs, tmp_path/'l')
    r = RunDir.open(tmp_path/'l')
    assert r.info['status'] == 'interrupted'
    assert set(r.info['metrics']) == {'pretrain/a', 'pretrain/b', 'sft/a'} and [c['question'] for c in r.info['changes']] == ['a']
    page, text = render(r); assert 'Partial: interrupted' in page and '**Partial:** interrupted' in text

# ---- statistics, against others

def test_the_interval_of_a_change_covers_the_truth():
    "300 samples of 150 paired items with a known difference: 95 % within 3 standard errors"
    rng, hits = np.random.default_rng(5), 0
    for i in range(300):
        a = rng.random(150) < .4
        b = np.where(a, rng.random(150) < .9, rng.random(150) < .2)
        d,_ = paired_bootstrap(ones(a), ones(b), draws=1000, seed=i); hits += d.lo <= .4*.9+.6*.2-.4 <= d.hi
    assert abs(hits/300-.95) < 3*(.95*.05/300)**.5

def test_p_of_no_change_is_even():
    rng = np.random.default_rng(6)
    ps = [paired_bootstrap(ones(x := rng.normal(size=80)), ones(x+rng.normal(size=80)), draws=1000, seed=i)[1] for i in range(300)]
    from scipy.stats import kstest
    assert kstest(ps, 'uniform').pvalue > 1e-3 and .02 < np.mean(np.array(ps) < .05) < .09

def test_holm_by_hand():
    "The definition, one p-value at a time"
    rng = np.random.default_rng(7)
    for _ in range(50):
        p = rng.random(9)**2
        h = np.array(holm(p.tolist())); k = p.argsort(); byhand = [max(min(1, (9-j)*p[k[j]]) for j in range(i+1)) for i in range(9)]
        assert np.allclose(h[k], byhand) and (h >= p-1e-12).all() and (h <= 1).all()

# ---- a browser

@pytest.mark.slow
def test_page_in_chromium(life, tmp_path):
    """Nothing is blocked or loaded, nothing sticks out on a phone, dark is dark, paper holds
    it; SLM_REPORT_PICTURE=nbs/report_page.png renews the book's picture"""
    pw = pytest.importorskip('playwright.sync_api', reason='needs: pip install playwright')
    chromium = next((p for n in ('chromium', 'chromium-browser', 'google-chrome') if (p := shutil.which(n))), None)
    if not chromium: pytest.skip('needs Chromium (Debian: apt install chromium)')
    ledger = Path(__file__).parents[1]/'results'/'38_eval.ledger'/'world'
    page_file = tmp_path/'r.html'; page_file.write_text(render(RunDir.open(ledger))[0])
    with pw.sync_playwright() as p:
        b = p.chromium.launch(executable_path=chromium, args=['--no-sandbox'])
        page = b.new_page(viewport=dict(width=1000, height=1100)); faults, asked = [], []
        page.on('console', lambda m: faults.append(m.text))
        page.on('pageerror', lambda e: faults.append(str(e))); page.on('request', lambda r: asked.append(r.url))
        page.goto(page_file.as_uri())
        assert page.title().startswith('The life of')
        assert page.locator('svg').count() > 5 and page.locator('.life li').count() == len(RunDir.open(ledger).info['stages'])
        ink = lambda: page.evaluate("getComputedStyle(document.querySelector('svg text')).fill")
        light = ink(); picture = Path(os.environ.get('SLM_REPORT_PICTURE') or tmp_path/'page.png'); page.screenshot(path=picture)
        page.emulate_media(color_scheme='dark'); assert ink() != light                                      # letters of the plots follow
        page.set_viewport_size(dict(width=380, height=700)); assert page.evaluate('document.documentElement.scrollWidth <= innerWidth')
        page.emulate_media(media='print', color_scheme='light')
        pdf = page.pdf(format='A4'); assert pdf[:4] == b'%PDF' and 1 < len(re.findall(rb'/Type\s*/Page\b', pdf)) < 30
        assert faults == [] and [u for u in asked if not u.startswith(('file:', 'data:'))] == []; b.close()
