//! Who is let in: TLS, users, and options that cannot work.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use etcd_client::{Client, ConnectOptions, Permission, PermissionType};
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};
use sirocco_store::{EtcdOptions, EtcdStore, Mirror, StoreError};
use sirocco_testkit::etcd::{Etcd, EtcdSetup, EtcdTls};
use tempfile::TempDir;

use crate::{refused_at_once, within};

/// An authority with one server and one client certificate, as PEM files `NAME.pem` and `NAME-key.pem`.
struct Certificates(TempDir);

impl Certificates {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let authority = CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap();
        fs::write(folder.path().join("ca.pem"), authority.pem()).unwrap();
        for (name, host) in [("server", "127.0.0.1"), ("client", "sirocco"), ("named", "etcd.example")] {
            let key = KeyPair::generate().unwrap();
            let params = CertificateParams::new([host.to_owned()]).unwrap();
            let certificate = params.signed_by(&key, &authority).unwrap();
            fs::write(folder.path().join(format!("{name}.pem")), certificate.pem()).unwrap();
            fs::write(folder.path().join(format!("{name}-key.pem")), key.serialize_pem()).unwrap();
        }
        Self(folder)
    }

    fn path(&self, file: &str) -> PathBuf {
        self.0.path().join(file)
    }

    fn serve(&self, name: &str) -> Etcd {
        let (cert, key) = (self.path(&format!("{name}.pem")), self.path(&format!("{name}-key.pem")));
        let tls = EtcdTls { cert, key, ca: self.path("ca.pem") };
        Etcd::start_with(&EtcdSetup { tls: Some(tls), ..EtcdSetup::default() }).unwrap()
    }

    fn options(&self, etcd: &Etcd) -> EtcdOptions {
        EtcdOptions {
            ca_file: Some(self.path("ca.pem")),
            cert_file: Some(self.path("client.pem")),
            key_file: Some(self.path("client-key.pem")),
            connect_timeout: Some(Duration::from_secs(1)),
            ..EtcdOptions::new([etcd.endpoint()])
        }
    }
}

#[tokio::test]
async fn tls_lets_in_only_those_with_certificates_that_match() {
    let (trusted, foreign) = (Certificates::new(), Certificates::new());
    let etcd = trusted.serve("server");
    let store = within("connect", EtcdStore::connect(trusted.options(&etcd))).await.unwrap();
    store.put("/app/key", "secret").await.unwrap();
    let mirror = Mirror::start(store, "/app/").await.unwrap();
    assert_eq!(mirror.snapshot().entries["/app/key"].value, "secret");

    let nameless = EtcdOptions { cert_file: None, key_file: None, ..trusted.options(&etcd) };
    let stranger = EtcdOptions { ca_file: Some(trusted.path("ca.pem")), ..foreign.options(&etcd) };
    let distrusting = EtcdOptions { ca_file: Some(foreign.path("ca.pem")), ..trusted.options(&etcd) };
    for (options, reason) in
        [(nameless, "client certificate"), (stranger, "client certificate"), (distrusting, "invalid peer certificate")]
    {
        let Err(error) = within("giving up", EtcdStore::connect(options)).await else { panic!("connected") };
        let text = error.to_string();
        assert!(text.contains(&etcd.endpoint()) && text.contains(reason), "{text}");
    }
}

#[tokio::test]
async fn a_certificate_may_bear_another_name_than_the_endpoint() {
    let certificates = Certificates::new();
    let etcd = certificates.serve("named");
    let Err(error) = within("giving up", EtcdStore::connect(certificates.options(&etcd))).await else {
        panic!("connected")
    };
    assert!(error.to_string().contains("not valid for name"), "{error}");
    let options = EtcdOptions { domain: Some("etcd.example".to_owned()), ..certificates.options(&etcd) };
    let store = within("connect", EtcdStore::connect(options)).await.unwrap();
    store.put("/app/key", "x").await.unwrap();
}

/// Two users: root, and `sirocco`, who may touch `/sirocco/` only.
async fn turn_on_users(etcd: &Etcd) {
    let mut root = Client::connect([etcd.endpoint()], None).await.unwrap();
    root.user_add("root", "toor", None).await.unwrap();
    root.user_grant_role("root", "root").await.unwrap();
    root.role_add("sirocco").await.unwrap();
    let all = Permission::new(PermissionType::Readwrite, "/sirocco/").with_prefix();
    root.role_grant_permission("sirocco", all).await.unwrap();
    root.user_add("sirocco", "wind", None).await.unwrap();
    root.user_grant_role("sirocco", "sirocco").await.unwrap();
    root.auth_enable().await.unwrap();
}

fn user(etcd: &Etcd, name: &str, password: &str) -> EtcdOptions {
    EtcdOptions {
        username: Some(name.to_owned()),
        password: Some(password.to_owned()),
        connect_timeout: Some(Duration::from_secs(10)),
        ..EtcdOptions::new([etcd.endpoint()])
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_user_stays_in_when_a_restart_of_etcd_forgets_all_tokens() {
    let mut etcd = Etcd::start().unwrap();
    turn_on_users(&etcd).await;
    let store = within("connect", EtcdStore::connect(user(&etcd, "sirocco", "wind"))).await.unwrap();
    store.put("/sirocco/key", "1").await.unwrap();
    let denied = store.put("/other", "x").await.unwrap_err();
    assert!(
        matches!(denied, StoreError::Refused { .. }) && denied.to_string().contains("permission denied"),
        "{denied}"
    );
    let mirror = Mirror::start(Arc::clone(&store), "/sirocco/").await.unwrap();

    etcd.restart().unwrap();
    store.put("/sirocco/key", "2").await.unwrap();
    let mut snapshots = mirror.subscribe();
    let newest = snapshots.wait_for(|snapshot| snapshot.entries["/sirocco/key"].value == "2");
    drop(within("the mirror", newest).await.unwrap());
    mirror.close().await;
}

#[tokio::test]
async fn a_user_stays_in_when_a_change_of_users_voids_signed_tokens() {
    let folder = tempfile::tempdir().unwrap();
    let (key, [private, public]) = (KeyPair::generate().unwrap(), ["key", "pub"].map(|name| folder.path().join(name)));
    fs::write(&private, key.serialize_pem()).unwrap();
    fs::write(&public, key.public_key_pem()).unwrap();
    let tokens = format!("jwt,pub-key={},priv-key={},sign-method=ES256", public.display(), private.display());
    let setup = EtcdSetup { args: vec!["--auth-token".to_owned(), tokens], ..EtcdSetup::default() };
    let etcd = Etcd::start_with(&setup).unwrap();
    turn_on_users(&etcd).await;
    let store = within("connect", EtcdStore::connect(user(&etcd, "sirocco", "wind"))).await.unwrap();
    store.put("/sirocco/key", "1").await.unwrap();

    let options = ConnectOptions::new().with_user("root", "toor");
    let mut root = Client::connect([etcd.endpoint()], Some(options)).await.unwrap();
    root.user_add("someone", "else", None).await.unwrap();
    store.put("/sirocco/key", "2").await.unwrap();
    assert_eq!(store.get("/sirocco/key").await.unwrap().unwrap().value, "2");
}

#[tokio::test]
async fn wrong_credentials_are_refused_at_once_and_never_shown() {
    let etcd = Etcd::start().unwrap();
    turn_on_users(&etcd).await;
    let options = user(&etcd, "sirocco", "guess-4711");
    assert!(!format!("{options:?}").contains("4711"));
    let error = refused_at_once(options).await;
    assert!(matches!(error, StoreError::Refused { .. }), "{error}");
    let text = error.to_string();
    assert!(text.contains(&etcd.endpoint()) && text.contains("invalid user ID or password"), "{text}");
    assert!(!text.contains("4711"), "{text}");

    let error = refused_at_once(EtcdOptions::new([etcd.endpoint()])).await.to_string();
    assert!(error.contains("user name is empty"), "{error}");
}

#[tokio::test]
async fn options_that_cannot_work_are_refused_by_name() {
    let certificates = Certificates::new();
    let garbage = certificates.path("garbage.pem");
    fs::write(&garbage, "no certificate").unwrap();
    let broken_key = certificates.path("broken-key.pem");
    fs::write(&broken_key, "-----BEGIN PRIVATE KEY-----\n!!\n-----END PRIVATE KEY-----\n").unwrap();
    let missing = Path::new("/nowhere/ca.pem");
    let http = || EtcdOptions::new(["http://127.0.0.1:1"]);
    let https =
        || EtcdOptions { ca_file: Some(certificates.path("ca.pem")), ..EtcdOptions::new(["https://127.0.0.1:1"]) };
    let pair = |cert: &Path, key: &Path| EtcdOptions {
        cert_file: Some(cert.to_owned()),
        key_file: Some(key.to_owned()),
        ..https()
    };
    let (cert, key) = (certificates.path("client.pem"), certificates.path("client-key.pem"));
    let other_key = certificates.path("server-key.pem");
    let cases = [
        (EtcdOptions::new(Vec::<String>::new()), "at least one"),
        (EtcdOptions::new(["127.0.0.1:2379"]), "\"127.0.0.1:2379\" must start with http:// or https://"),
        (EtcdOptions::new(["http://127.0.0.1"]), "host:port"),
        (EtcdOptions::new(["http://127.0.0.1:70000"]), "1 to 65535"),
        (EtcdOptions::new(["http://a b:2379"]), "host:port"),
        (EtcdOptions::new(["http://127.0.0.1:2379/v3"]), "nothing after it"),
        (EtcdOptions::new(["https://127.0.0.1:2379"]), "needs the CA file"),
        (EtcdOptions { ca_file: https().ca_file, ..http() }, "use https"),
        (EtcdOptions { timeout: Duration::ZERO, ..http() }, "etcd timeout"),
        (EtcdOptions { username: Some("me".into()), ..http() }, "etcd username \"me\" needs a password"),
        (EtcdOptions { password: Some("hush".into()), ..http() }, "etcd password \"(hidden)\" needs a username"),
        (
            EtcdOptions { ca_file: Some(missing.to_owned()), ..https() },
            "\"/nowhere/ca.pem\" cannot be read: No such file",
        ),
        (EtcdOptions { ca_file: Some(garbage.clone()), ..https() }, "garbage.pem\" holds no PEM"),
        (EtcdOptions { cert_file: Some(cert.clone()), ..https() }, "needs a key file"),
        (EtcdOptions { key_file: Some(key.clone()), ..https() }, "needs a cert file"),
        (EtcdOptions { cert_file: Some(cert.clone()), ..http() }, "needs a CA file"),
        (pair(&garbage, &key), "etcd cert file"),
        (pair(&cert, &garbage), "etcd key file"),
        (pair(&cert, &broken_key), "certificates"),
        (pair(&cert, &other_key), "certificates"),
    ];
    for (options, problem) in cases {
        let error = refused_at_once(options).await;
        assert!(matches!(error, StoreError::Options { .. }), "{error}");
        let text = error.to_string();
        assert!(text.contains(problem), "wanted {problem:?} in: {text}");
        assert!(!text.contains("hush"), "{text}");
    }
}
