#![allow(missing_docs)]
#[path = "../tests/browser/mod.rs"]
mod browser;
fn main() {
    let args: Vec<String> = std::env::args().collect();
    let (url, out) = (&args[1], std::path::Path::new(&args[2]));
    let mut b = browser::Browser::start(&browser::find().unwrap());
    let t = b.open("about:blank");
    t.size(&mut b, args[3].parse().unwrap(), args[4].parse().unwrap());
    t.theme(&mut b, &args[5]);
    t.call(&mut b, "Page.navigate", serde_json::json!({ "url": url }));
    std::thread::sleep(std::time::Duration::from_millis(args[6].parse().unwrap()));
    t.screenshot(&mut b, out);
    println!("{}", t.text(&mut b));
}
