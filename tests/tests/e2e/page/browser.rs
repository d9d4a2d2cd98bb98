//! A headless Chromium with a fresh profile, driven through chromedriver; nothing of it is left behind, whatever a test does.
//!
//! A missing browser is a failure that says so, never a skip.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use fantoccini::elements::Element;
use fantoccini::wd::{Capabilities, WebDriverCompatibleCommand};
use fantoccini::{Client, ClientBuilder, Locator};
use hyper_util::client::legacy::connect::HttpConnector;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};
use sirocco_testkit::PATIENCE;
use sirocco_testkit::process::Process;
use tempfile::TempDir;
use tokio::sync::{Mutex, MutexGuard};
use url::{ParseError, Url};

/// A browser that does nothing of its own accord.
const ARGUMENTS: [&str; 9] = [
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
];

/// Browsers take a machine of few cores for themselves, so there is one at a time.
static TURN: Mutex<()> = Mutex::const_new(());

/// A browser with one page.
pub(super) struct Browser {
    client: Client,
    /// Killed after the browser's own processes.
    _driver: Process,
    profile: TempDir,
    _turn: MutexGuard<'static, ()>,
}

/// A command of WebDriver or of chromedriver, relative to the session.
#[derive(Debug)]
struct Command {
    path: String,
    body: Option<Value>,
}

impl WebDriverCompatibleCommand for Command {
    fn endpoint(&self, base: &Url, session: Option<&str>) -> Result<Url, ParseError> {
        base.join(&format!("session/{}/{}", session.unwrap_or_default(), self.path))
    }

    fn method_and_body(&self, _: &Url) -> (http::Method, Option<String>) {
        let method = if self.body.is_some() { http::Method::POST } else { http::Method::GET };
        (method, self.body.as_ref().map(Value::to_string))
    }
}

/// The program that `variable` names, else `name` on the path.
fn program(variable: &str, name: &str) -> PathBuf {
    std::env::var_os(variable).map_or_else(|| name.into(), PathBuf::from)
}

impl Browser {
    /// Starts a browser and opens `url` in it.
    pub(super) async fn open(url: &str) -> Self {
        let turn = TURN.lock().await;
        let driver = program("SIROCCO_CHROMEDRIVER_BIN", "chromedriver");
        let mut driver = Process::start_at(&driver, &["--port=0"], &[]).unwrap();
        let started = "ChromeDriver was started successfully on port ";
        let line = driver.wait_for_line(started).unwrap();
        let port = line[started.len()..].trim_end_matches('.').to_owned();
        let profile = tempfile::tempdir().unwrap();
        let folder = format!("--user-data-dir={}", profile.path().display());
        let arguments: Vec<&str> = ARGUMENTS.into_iter().chain([folder.as_str()]).collect();
        let binary = which(&program("SIROCCO_CHROMIUM_BIN", "chromium"));
        let wanted = json!({
            "browserName": "chrome",
            "goog:loggingPrefs": {"browser": "ALL", "performance": "ALL"},
            "goog:chromeOptions": {"binary": binary, "args": arguments},
        });
        let wanted: Capabilities = wanted.as_object().unwrap().clone();
        let mut builder = ClientBuilder::new(HttpConnector::new());
        let client = builder.capabilities(wanted).connect(&format!("http://127.0.0.1:{port}")).await.unwrap();
        let browser = Self { client, _driver: driver, profile, _turn: turn };
        browser.resize(1280, 860).await;
        // The empty page that a browser begins with loads something of its own.
        browser.requests().await;
        browser.client.goto(url).await.unwrap();
        browser
            .until("the page to know its model", "return document.querySelector('#model strong')?.textContent")
            .await;
        browser
    }

    /// What `script`, the body of a function, returns.
    pub(super) async fn script(&self, script: &str) -> Value {
        self.client.execute(script, Vec::new()).await.unwrap_or_else(|error| panic!("{script}: {error}"))
    }

    /// Waits until `script` returns something that counts as true, and returns that.
    pub(super) async fn until(&self, what: &str, script: &str) -> Value {
        let began = Instant::now();
        loop {
            let value = self.script(script).await;
            if !matches!(value, Value::Null | Value::Bool(false)) && value != 0 && value != "" {
                return value;
            }
            assert!(began.elapsed() < PATIENCE, "waited {PATIENCE:?} for {what}");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// The text of the first element at `css`.
    pub(super) async fn text(&self, css: &str) -> String {
        let value = self.script(&format!("return document.querySelector({css:?}).textContent")).await;
        value.as_str().unwrap().to_owned()
    }

    /// How many elements are at `css`.
    pub(super) async fn count(&self, css: &str) -> usize {
        self.client.find_all(Locator::Css(css)).await.unwrap().len()
    }

    /// Clicks the first element at `css`, as a person would: it must be there to be clicked.
    pub(super) async fn click(&self, css: &str) {
        self.find(css).await.click().await.unwrap_or_else(|error| panic!("click {css}: {error}"));
    }

    /// Clicks the last button called `name`.
    pub(super) async fn click_button(&self, name: &str) {
        let path = format!("(//button[normalize-space()={name:?}])[last()]");
        let button = self.client.find(Locator::XPath(&path)).await.unwrap_or_else(|error| panic!("{name}: {error}"));
        button.click().await.unwrap_or_else(|error| panic!("click {name}: {error}"));
    }

    /// Types into the first element at `css`.
    pub(super) async fn type_into(&self, css: &str, keys: &str) {
        self.find(css).await.send_keys(keys).await.unwrap();
    }

    /// Replaces what is in the field at `css`.
    pub(super) async fn fill(&self, css: &str, value: &str) {
        self.find(css).await.clear().await.unwrap();
        self.type_into(css, value).await;
    }

    /// Presses keys wherever the focus is.
    pub(super) async fn press(&self, keys: &str) {
        self.client.active_element().await.unwrap().send_keys(keys).await.unwrap();
    }

    /// Every element at `css`, with its role and name as a screen reader is told them.
    pub(super) async fn told(&self, css: &str) -> Vec<(String, String, String)> {
        let mut told = Vec::new();
        for element in self.client.find_all(Locator::Css(css)).await.unwrap() {
            if !element.is_displayed().await.unwrap() {
                continue;
            }
            let id = element.element_id().to_string();
            let ask = async |what: &str| self.command(&format!("element/{id}/{what}"), None).await;
            let (role, name) = (ask("computedrole").await, ask("computedlabel").await);
            let html = element.html(false).await.unwrap();
            told.push((role.as_str().unwrap().to_owned(), name.as_str().unwrap().to_owned(), html));
        }
        told
    }

    /// Loads the page anew.
    pub(super) async fn reload(&self) {
        self.client.refresh().await.unwrap();
        self.until("the page to know its model", "return document.querySelector('#model strong')?.textContent").await;
    }

    /// Gives the page that many pixels.
    pub(super) async fn resize(&self, width: u32, height: u32) {
        let size = json!({"width": width, "height": height, "deviceScaleFactor": 1, "mobile": false});
        self.tell("Emulation.setDeviceMetricsOverride", &size).await;
    }

    /// Makes the system's colour scheme dark or light.
    pub(super) async fn prefer(&self, scheme: &str) {
        let features = json!([{"name": "prefers-color-scheme", "value": scheme}]);
        self.tell("Emulation.setEmulatedMedia", &json!({"features": features})).await;
    }

    /// Writes a picture of the page to `target/screenshots`.
    pub(super) async fn picture(&self, name: &str) {
        let test = std::env::current_exe().unwrap();
        let folder = test.ancestors().nth(3).unwrap().join("screenshots");
        std::fs::create_dir_all(&folder).unwrap();
        std::fs::write(folder.join(format!("{name}.png")), self.client.screenshot().await.unwrap()).unwrap();
    }

    /// What the console has warned of since it was last asked; a status that a server may well answer with is no news.
    pub(super) async fn complaints(&self) -> Vec<String> {
        let entries = self.command("se/log", Some(json!({"type": "browser"}))).await;
        let bad =
            entries.as_array().unwrap().iter().filter(|entry| entry["level"] != "DEBUG" && entry["level"] != "INFO");
        bad.map(|entry| entry["message"].as_str().unwrap().to_owned()).collect()
    }

    /// Where every request of the page went since this was last asked.
    pub(super) async fn requests(&self) -> Vec<String> {
        let entries = self.command("se/log", Some(json!({"type": "performance"}))).await;
        let messages = entries.as_array().unwrap().iter().filter_map(|entry| entry["message"].as_str());
        let messages = messages.map(|message| serde_json::from_str::<Value>(message).unwrap()["message"].clone());
        let sent = messages.filter(|message| message["method"] == "Network.requestWillBeSent");
        sent.map(|message| message["params"]["request"]["url"].as_str().unwrap().to_owned()).collect()
    }

    /// Ends the browser, which must leave no process.
    pub(super) async fn end(self) {
        self.client.clone().close().await.unwrap();
        let began = Instant::now();
        while !processes(self.profile.path()).is_empty() {
            assert!(began.elapsed() < PATIENCE, "waited {PATIENCE:?} for the browser to end");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    async fn find(&self, css: &str) -> Element {
        self.client.find(Locator::Css(css)).await.unwrap_or_else(|error| panic!("{css}: {error}"))
    }

    /// Tells the browser's own debugging protocol.
    async fn tell(&self, command: &str, params: &Value) {
        self.command("goog/cdp/execute", Some(json!({"cmd": command, "params": params}))).await;
    }

    async fn command(&self, path: &str, body: Option<Value>) -> Value {
        let command = Command { path: path.to_owned(), body };
        self.client.issue_cmd(command).await.unwrap_or_else(|error| panic!("{path}: {error}"))
    }
}

impl Drop for Browser {
    fn drop(&mut self) {
        // After a failure the session was not closed, and killing the driver alone would leave the browser running.
        for pid in processes(self.profile.path()) {
            let _ = kill_process(pid, Signal::KILL);
        }
    }
}

/// The processes whose command line names `profile`.
fn processes(profile: &Path) -> Vec<Pid> {
    let name = profile.as_os_str().as_encoded_bytes();
    let all = std::fs::read_dir("/proc").unwrap().filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok());
    let ours = all.filter(|pid: &i32| {
        let line = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        line.windows(name.len()).any(|part| part == name)
    });
    ours.filter_map(Pid::from_raw).collect()
}

/// The file of `program`: chromedriver does not look for it on the path.
fn which(program: &Path) -> PathBuf {
    if program.components().count() > 1 {
        return program.to_owned();
    }
    let path = std::env::var_os("PATH").unwrap_or_default();
    let found = std::env::split_paths(&path).map(|folder| folder.join(program)).find(|file| file.is_file());
    found.unwrap_or_else(|| panic!("{} is missing; set SIROCCO_CHROMIUM_BIN or install chromium", program.display()))
}
